"""The jobs as a user runs them: through spark-submit and python, with their exit codes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from pipelines.cli import explain
from pipelines.session import _last_error
from tests.conftest import ROOT
from tests.faults import SEED, STAGES, Bench, check_full_disk, on_a_full_disk

BIN = Path(sys.executable).parent
SUBMIT = [str(BIN / "spark-submit"), "--properties-file", "conf/spark.conf"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, session_lake: Path) -> Iterator[dict[str, str]]:
    """As after `source .venv/bin/activate`, with a lake of its own."""
    lake = tmp_path_factory.mktemp("jobs") / "lake"
    lake.mkdir()
    (lake / "mlflow.db").write_bytes((session_lake / "mlflow.db").read_bytes())
    names = {k: v for k, v in os.environ.items() if not k.startswith(("PYSPARK", "SPARK_CONF", "MLFLOW", "OMP"))}
    yield {**names, "HEADRACE_LAKE": str(lake), "PATH": f"{BIN}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, rows_csv: Callable[..., str]) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "rows.csv").write_text(rows_csv(200))
    config = {
        "workload": "tiny",
        "source": {"format": "csv", "paths": f"{folder}/rows.csv", "schema": "a double, b double, color string, y int"},
        "split": {"hash": {}, "validation": {"share": 0.2}},
        "features": {
            "label": {"column": "y", "kind": "binary", "positive": [1], "negative": [0]},
            "inputs": {"dense": {"columns": ["a", "b"], "steps": ["standardize"]}},
        },
        "classic": [{"estimator": "LogisticRegression", "maxIter": 5}],
        "model": {"network": "softmax"},
        "train": {"ranks": 2, "batch_size": 16, "epochs": 1},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def job(environment: dict[str, str], *command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(list(command), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


Chain = dict[str, tuple[str, float]]


@pytest.fixture(scope="module")
def chain(environment: dict[str, str], tiny: Path) -> Chain:
    """What each stage prints and its wall time, all run in order through spark-submit."""
    found = {}
    for stage in STAGES:
        started = time.monotonic()
        done = job(environment, *SUBMIT, f"jobs/{stage}.py", str(tiny))
        found[stage] = (done.stdout, time.monotonic() - started)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_runs_through_spark_submit(environment: dict[str, str], chain: Chain, stage: str) -> None:
    printed, _ = chain[stage]
    assert f"{stage:<9} done in" in printed
    receipt = json.loads((Path(environment["HEADRACE_LAKE"]) / "runs" / "tiny" / f"{stage}.json").read_text())
    assert receipt["stage"] == stage and receipt["rows"] > 0
    noise = [line for line in printed.splitlines() if "WARN" in line or "INFO" in line]
    assert not noise, noise


@pytest.mark.usefixtures("chain")
def test_nothing_to_do_starts_no_jvm(environment: dict[str, str], tiny: Path) -> None:
    no_java = {**environment, "JAVA_HOME": "/nowhere", "PATH": str(BIN)}
    done = job(no_java, str(BIN / "python"), "jobs/run.py", str(tiny))
    assert len(done.stdout.splitlines()) == 7 and all("up to date" in line for line in done.stdout.splitlines())
    assert not done.stderr


def test_an_interrupted_stage_goes_on(environment: dict[str, str], tiny: Path, chain: Chain) -> None:
    """The short form of tests/test_faults.py: one stage and one signal, drawn by the seed that is printed."""
    bench = Bench(Path(environment["HEADRACE_LAKE"]), tiny, environment)
    wanted = bench.made()
    generator = random.Random(SEED)
    stage = generator.choice(STAGES)
    print(f"seed {SEED}: {stage}")
    (bench.lake / "runs" / "tiny" / f"{stage}.json").unlink()
    how = generator.choice([signal.SIGINT, signal.SIGKILL])
    bench.interrupt(stage, how, generator.uniform(0, chain[stage][1]))
    bench.check_goes_on(stage, wanted)


def test_a_jvm_that_ends_is_told_in_a_line(
    environment: dict[str, str], tiny: Path, session_lake: Path, tmp_path: Path
) -> None:
    shutil.copy(session_lake / "mlflow.db", tmp_path)
    bench = Bench(tmp_path, tiny, environment | {"HEADRACE_LAKE": str(tmp_path)})
    process = bench.start("ingest")
    until, events = time.monotonic() + 60, ""
    while "SparkListenerJobStart" not in events and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
        events = "".join(log.read_text() for log in (tmp_path / "logs/spark").rglob("*.inprogress"))
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.name() == "java":
            child.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    said = "error: Spark's JVM ended: it wrote no error; something may have killed it; the same command goes on"
    assert [line.startswith(said) for line in err.splitlines() if not line.startswith("  ")] == [True], err
    bench.finish("ingest")


def test_why_a_jvm_ended() -> None:
    found = str(explain(RuntimeError("Job aborted: java.lang.OutOfMemoryError: Java heap space")))
    assert found.startswith("Spark has not enough memory: raise spark.driver.memory")
    follows = "org.apache.spark.SparkException: Job 6 cancelled because SparkContext was shut down"
    bare = "Exception in thread x java.lang.StackOverflowError"
    assert _last_error(f"a\njava.lang.OutOfMemoryError: Java heap space\n  at b.c\n{follows}\n").startswith(
        "java.lang.Out"
    )
    assert _last_error(f"{follows}\n{bare}\n\tat d.e(F.java:1)\n") == "java.lang.StackOverflowError"
    assert _last_error("all is well\n") == ""


@pytest.mark.faults
def test_a_full_disk(environment: dict[str, str], tiny: Path, session_lake: Path, tmp_path: Path) -> None:
    bench = Bench(tmp_path, tiny, environment | {"HEADRACE_LAKE": str(tmp_path)})
    done = on_a_full_disk(bench, "ingest", session_lake / "mlflow.db", free_kb=100)
    if done is None:
        pytest.skip("needs the right to make a mount namespace")
    check_full_disk(done)


@pytest.mark.usefixtures("chain")
def test_leaderboard(environment: dict[str, str], tiny: Path) -> None:
    python = str(BIN / "python")
    text = job(environment, python, "jobs/leaderboard.py", str(tiny)).stdout
    assert "LogisticRegression" in text and "softmax" in text and "validation auc" in text
    assert "auc 95%" in text and "rows/s" in text
    value = json.loads(job(environment, python, "jobs/leaderboard.py", str(tiny), "--format", "json").stdout)
    assert {c["name"] for c in value["candidates"]} == {"LogisticRegression", "softmax"}
    for candidate in value["candidates"]:
        interval = candidate["interval"]
        assert interval["low"] <= candidate["metrics"]["auc"] <= interval["high"] and candidate["rows_per_s"] > 0


@pytest.mark.usefixtures("chain")
def test_exit_codes(environment: dict[str, str], tiny: Path, tmp_path: Path) -> None:
    python = str(BIN / "python")
    wrong = job(environment, python, "jobs/run.py", str(tiny), "--set", "train.epoch=1", code=2)
    assert wrong.stderr.startswith("error: ") and "did you mean 'epochs'" in wrong.stderr and not wrong.stdout
    assert len(wrong.stderr.splitlines()) == 1
    missing = job(environment, python, "jobs/ingest.py", str(tmp_path / "no.yaml"), code=2)
    assert "no.yaml: wanted a config file, seen none" in missing.stderr
    fault = job(environment, python, "jobs/ingest.py", str(tiny), "--set", f"source.paths={tmp_path}/x.csv", code=1)
    assert "wanted csv files at" in fault.stderr and len(fault.stderr.splitlines()) == 1
    again = job(environment, python, "jobs/rollback.py", str(tiny), code=1)
    assert "wanted an earlier version of tiny, seen versions 1" in again.stderr
    path = Path(environment["HEADRACE_LAKE"]) / "runs" / "tiny" / "evaluate.json"
    receipt = json.loads(path.read_text())
    check = {"rule": "auc", "wanted": ">= 1.5", "seen": "0.9", "passed": False}
    receipt["result"]["verdict"] |= {"passed": False, "checks": [check]}
    path.write_text(json.dumps(receipt))
    refused = job(environment, python, "jobs/register.py", str(tiny), code=3)
    assert "auc: wanted >= 1.5, seen 0.9; nothing was registered" in refused.stderr


def test_a_server_that_does_not_answer(environment: dict[str, str], tiny: Path) -> None:
    unreachable = {**environment, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    done = job(
        unreachable, str(BIN / "python"), "jobs/ingest.py", str(tiny), "--set", "source.max_rejected=0.5", code=1
    )
    assert "MLFLOW_TRACKING_URI http://127.0.0.1:9: wanted an MLflow server" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_local_lake_under_a_cluster_is_refused(environment: dict[str, str], tiny: Path, tmp_path: Path) -> None:
    conf = tmp_path / "cluster.conf"
    conf.write_text("spark.master spark://127.0.0.1:7077\n")
    arguments = ["jobs/ingest.py", str(tiny), "--set", "source.max_rejected=0.3", "--properties-file", str(conf)]
    done = job(environment, str(BIN / "python"), *arguments, code=1)
    assert "set lake.shared: true" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["run", "train", "leaderboard", "rollback", "clean", "ui", "demo"])
def test_help(environment: dict[str, str], name: str) -> None:
    text = job(environment, str(BIN / "python"), f"jobs/{name}.py", "--help").stdout
    assert "usage:" in text and "jobs/" in text


@pytest.mark.usefixtures("chain")
def test_clean_says_what_it_removes(environment: dict[str, str], tiny: Path) -> None:
    lake = Path(environment["HEADRACE_LAKE"])
    would = job(environment, str(BIN / "python"), "jobs/clean.py", str(tiny), "--dry-run").stdout
    assert f"would remove {lake}/tables/tiny" in would and (lake / "tables" / "tiny").is_dir()
    there = {str(lake / part / "tiny") for part in ("tables", "runs", "models")}
    done = job(environment, str(BIN / "python"), "jobs/clean.py", str(tiny)).stdout
    removed = {line.split()[1] for line in done.splitlines() if line.startswith("removes ")}
    assert there <= removed and "kept: runs and registered models" in done
    assert not any(Path(folder).exists() for folder in removed) and (lake / "mlflow.db").is_file()


def test_doctor(environment: dict[str, str]) -> None:
    done = job(environment, sys.executable, "jobs/doctor.py")
    assert "ok       Java 17 or 21" in done.stdout and "packages of constraints.txt: there" in done.stdout
    no_java = {**environment, "PATH": "/nowhere", "JAVA_HOME": ""}
    missing = job(no_java, sys.executable, "jobs/doctor.py", "--quiet", code=1)
    assert missing.stdout.splitlines() == [
        "MISSING  Java 17 or 21: none; apt install openjdk-17-jre-headless, or set JAVA_HOME"
    ]
