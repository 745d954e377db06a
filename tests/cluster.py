"""A real standalone Spark cluster on loopback, from pyspark's own spark-class: a Master and two Workers.

Each Worker says that it has two GPUs, 5 and 7: Spark deals them to tasks like real ones.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyspark

from tests.conftest import ROOT

BIN = Path(sys.executable).parent
Submit = Callable[..., dict[str, Any]]
SPARK_CLASS = Path(pyspark.__file__).parent / "bin" / "spark-class"
QUICK = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
SECRET = "only-for-tests-on-loopback"


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def properties(port: int, gpus: Path) -> dict[str, str]:
    return {
        "spark.master": f"spark://127.0.0.1:{port}",
        "spark.authenticate": "true",
        "spark.authenticate.secret": SECRET,
        "spark.network.crypto.enabled": "true",
        "spark.io.encryption.enabled": "true",
        "spark.executor.memory": "1g",
        "spark.executor.extraJavaOptions": QUICK,
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.worker.resource.gpu.amount": "2",
        "spark.worker.resource.gpu.discoveryScript": str(gpus),
        "spark.executor.resource.gpu.amount": "2",
        "spark.task.resource.gpu.amount": "1",
    }


@contextlib.contextmanager
def standalone_cluster(folder: Path, conf: Path, *, cores: int = 1) -> Iterator[Path]:
    """Start the cluster, with so many cores a Worker; gives a properties file for jobs on it, made from `conf`."""
    port, gpus = free_port(), folder / "gpus"
    gpus.write_text("""#!/bin/sh\necho '{"name": "gpu", "addresses": ["5", "7"]}'\n""")
    gpus.chmod(0o755)
    own = "".join(f"{key} {value}\n" for key, value in properties(port, gpus).items())
    lines = [line for line in conf.read_text().splitlines() if not line.startswith("spark.master")]
    submit = folder / "cluster.conf"
    submit.write_text("\n".join(lines) + "\n" + own)
    daemon = folder / "daemon"
    daemon.mkdir()
    (daemon / "spark-defaults.conf").write_text(own)
    environment = {**os.environ, "SPARK_CONF_DIR": str(daemon), "SPARK_DAEMON_JAVA_OPTS": QUICK}
    master = ["org.apache.spark.deploy.master.Master", "--host", "127.0.0.1", "--port", str(port), "--webui-port", "0"]
    worker = ["org.apache.spark.deploy.worker.Worker", "--host", "127.0.0.1", "--cores", str(cores), "--memory", "2g"]
    worker += ["--webui-port", "0", f"spark://127.0.0.1:{port}"]
    processes = []
    try:
        for i, arguments in enumerate([master, worker, worker]):
            work = ["--work-dir", str(folder / f"work{i}")] if i else []
            with (folder / f"daemon{i}.log").open("w") as log:
                command = [str(SPARK_CLASS), *arguments[:1], *work, *arguments[1:]]
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
            if not i:
                _wait_for(port)
        yield submit
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def submitter(conf: Path, lake: Path) -> Submit:
    """Runs workloads by spark-submit, on a shared lake: `submit("train", path, overrides...)` gives its receipts."""
    names = {k: v for k, v in os.environ.items() if not k.startswith(("PYSPARK", "SPARK_CONF", "MLFLOW", "OMP"))}
    environment = {**names, "HEADRACE_LAKE": str(lake), "PATH": f"{BIN}:{os.environ['PATH']}"}

    def run(job: str, workload: str | Path, *overrides: str) -> dict[str, Any]:
        command = [str(BIN / "spark-submit"), "--properties-file", str(conf), f"jobs/{job}.py", str(workload)]
        for override in ("lake.shared=true", *overrides):
            command += ["--set", override]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        runs = (lake / "runs" / Path(workload).stem).glob("*.json")
        return {path.stem: json.loads(path.read_text()) for path in runs}

    return run


def _wait_for(port: int) -> None:
    for _ in range(300):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError("the Master did not start")
