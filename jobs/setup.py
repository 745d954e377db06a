"""Set up once: a virtual environment in the clone, the packages of constraints.txt, the Delta jars, MLflow's tables.

    python3 jobs/setup.py STAMP

Uses the standard library only. STAMP is written last, so a set-up that was cut short starts again.
"""

import os
import re
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")
LOG = os.path.join(VENV, "setup.log")
LINE_EVERY_S = 15

# The first session fetches Delta's jars; at its end the JVM writes the classes that it loaded to .venv/spark.jsa.
WARM = """
import pathlib, tempfile
from pipelines import session, tracking
from pipelines.config import load_config
from pyspark.ml.classification import LogisticRegression
from pyspark.ml.functions import array_to_vector

tracking.create_store()
conf = pathlib.Path("conf/spark.conf").read_text().replace("-XX:SharedArchiveFile=", "-XX:ArchiveClassesAtExit=")
own = pathlib.Path(".venv/spark-archive.conf")
own.write_text(conf)
session.use_properties(own)
spark = session.get_session(load_config("conf/digits.yaml"))
with tempfile.TemporaryDirectory() as folder:
    rows = spark.range(100).selectExpr("cast(id % 2 as double) label", "array(cast(id as double)) x")
    rows.write.format("delta").save(folder + "/t")
    rows = spark.read.format("delta").load(folder + "/t")
    rows.groupBy("label").count().collect()
    LogisticRegression(maxIter=1).fit(rows.select("label", array_to_vector("x").alias("features")))
java = spark.sparkContext._gateway
spark.stop()
java.proc.stdin.close()
java.proc.wait()
own.unlink()
"""


def step(number, what, command, total=0):
    """Run a command with its output in the log, and show how far it is."""
    started = last = time.time()
    print("[{}/4] {}".format(number, what), flush=True)
    done = 0
    with open(LOG, "a") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in process.stdout:
            log.write(line)
            found = re.match(r"\s*(Collecting|Downloading|Installing collected packages)\s?(\S*)", line)
            done += bool(found and found.group(1) == "Collecting")
            if found and (sys.stdout.isatty() or time.time() - last > LINE_EVERY_S):
                last = time.time()
                name = found.group(2).partition("==")[0].rpartition("/")[2].partition("-")[0]
                text = (
                    "installing them" if found.group(1).startswith("Inst") else "{} of {}: {}".format(done, total, name)
                )
                end = "\r" if sys.stdout.isatty() else "\n"
                print("      {:<60}".format(text), end=end, flush=True)
        code = process.wait()
    if code:
        with open(LOG) as log:
            tail = "".join(log.readlines()[-12:])
        sys.exit("set-up failed in: {}\n{}\nthe whole log: {}".format(what, tail, LOG))
    print("      done in {:.0f} s{}".format(time.time() - started, " " * 50), flush=True)


def main():
    """Four steps; each can be run again."""
    stamp = sys.argv[1]
    os.makedirs(VENV, exist_ok=True)
    open(LOG, "w").close()
    with open(os.path.join(ROOT, "constraints.txt")) as file:
        total = len(re.findall(r"^\S+==", file.read(), re.M))
    pip = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    step(1, "virtual environment in .venv", [sys.executable, "-m", "venv", VENV])
    step(
        2,
        "packages of constraints.txt (about 3 GB to fetch)",
        pip + ["--require-hashes", "-r", "constraints.txt"],
        total,
    )
    step(3, "headrace itself", pip + ["--no-deps", "--no-build-isolation", "-e", "."])
    step(4, "Delta's jars, MLflow's tables, Spark's classes", [PYTHON, "-c", WARM])
    for name in os.listdir(VENV):
        if name.startswith(".setup-"):
            os.unlink(os.path.join(VENV, name))
    open(stamp, "w").close()


if __name__ == "__main__":
    main()
