"""Ctrl-C, kill -9 and a full disk at any moment: nothing lost or half-written, and the same command goes on.

Moments are drawn uniformly over the wall time of an undisturbed run. The seed is printed; HEADRACE_FAULT_SEED
repeats a run with it.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pipelines.lake import Snapshot
from tests.conftest import ROOT

STAGES = ["ingest", "features", "classic", "train", "evaluate", "register", "score"]
STARTED_S = 1.0  # before this, Python itself may be what is interrupted
SEED = int(os.environ.get("HEADRACE_FAULT_SEED") or random.SystemRandom().randrange(10**6))
TRIALS = 3
LEFT_OUT = ["--set", "model=null"]  # the short form leaves training to tests/train/test_launch.py, which kills it


@dataclass
class Bench:
    """A tiny workload in a lake that is set back before each trial.

    Attributes:
        before: For each stage, a copy of the lake as it is before the stage; `run` for the whole chain.
        seconds: Wall time of each undisturbed job.
        wanted: What each stage's receipt says after an undisturbed run.
    """

    lake: Path
    config: Path
    environment: dict[str, str]
    before: dict[str, Path]
    seconds: dict[str, float]
    wanted: dict[str, Any]

    def start(self, job: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, f"jobs/{job}.py", str(self.config), *(LEFT_OUT if job == "run" else [])],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, job: str) -> str:
        process = self.start(job)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, f"{job}: exit code {process.returncode}\n{out}\n{err}"
        return out

    def interrupt(self, job: str, how: signal.Signals, after_s: float) -> None:
        """Start the job, send it the signal at the moment, and check what it leaves."""
        process = self.start(job)
        try:
            out, err = process.communicate(timeout=after_s)
        except subprocess.TimeoutExpired:
            if how == signal.SIGINT:
                os.killpg(process.pid, how)  # as a terminal does
            else:
                process.send_signal(how)
            out, err = process.communicate(timeout=60)
        assert "Traceback" not in err or after_s < STARTED_S, err
        if how == signal.SIGINT and process.returncode and after_s >= STARTED_S:
            assert process.returncode == 130, f"exit code {process.returncode}\n{out}\n{err}"
            assert err.strip().splitlines()[-1] == "interrupted; the same command goes on where it stopped"
        self.check_tables()

    def check_tables(self) -> None:
        """Every table that is there can be read, and every receipt is whole."""
        for log in self.lake.glob("tables/**/_delta_log"):
            if list(log.glob("*.json")):
                Snapshot.open(log.parent)
        for receipt in self.lake.glob("runs/*/*.json"):
            json.loads(receipt.read_text())

    def set_back(self, job: str) -> None:
        shutil.rmtree(self.lake)
        shutil.copytree(self.before[job], self.lake)

    def stages_of(self, job: str) -> list[str]:
        return [stage for stage in STAGES if stage != "train"] if job == "run" else [job]

    def made(self) -> dict[str, Any]:
        """What the receipts say, without what differs from run to run."""
        found = {}
        for stage in STAGES:
            path = self.lake / "runs" / "tiny" / f"{stage}.json"
            if path.is_file():
                receipt = json.loads(path.read_text())
                found[stage] = (receipt["rows"], _stable(stage, receipt["result"]))
        return found

    def left_over(self) -> list[str]:
        """Processes of the workload that still run."""
        deadline = time.monotonic() + 20
        while True:
            found = [
                " ".join(process.info["cmdline"])
                for process in psutil.process_iter(["cmdline"])
                if any(str(self.lake.parent) in part for part in process.info["cmdline"] or [])
            ]
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.5)


def _stable(stage: str, result: dict[str, Any]) -> Any:
    if stage == "ingest":
        return result["rows_read"], result["snapshot"]["rows"], result["snapshot"]["row_id_sum"]
    if stage == "features":
        rows = {split: (s["rows"], s["row_id_sum"]) for split, s in result["snapshots"].items()}
        return rows, result["fitted"]
    if stage == "classic":
        return [model["name"] for model in result["models"]]
    if stage == "train":
        return [(e["epoch"], e["rows"], e["row_id_sum"], round(e["loss"], 6)) for e in result["epochs"]]
    if stage == "evaluate":
        metrics = {c["name"]: {k: round(v, 6) for k, v in c["metrics"].items()} for c in result["candidates"]}
        return metrics, result["champion"]
    if stage == "register":
        return result["version"], result["alias"], result["model"]
    return result["model_version"]


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory, session_lake: Path, rows_csv: Callable[..., str]
) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("faults")
    lake, config = root / "lake", root / "tiny.yaml"
    lake.mkdir()
    shutil.copy(session_lake / "mlflow.db", lake)
    (root / "rows.csv").write_text(rows_csv(2000))
    sections = {
        "workload": "tiny",
        "source": {"format": "csv", "paths": f"{root}/rows.csv", "schema": "a double, b double, color string, y int"},
        "split": {"hash": {}, "validation": {"share": 0.2}},
        "features": {
            "label": {"column": "y", "kind": "binary", "positive": [1], "negative": [0]},
            "inputs": {
                "dense": {"columns": ["a", "b"], "steps": ["standardize"]},
                "ids": {"columns": ["color"], "steps": ["vocabulary"]},
            },
        },
        "classic": [{"estimator": "LogisticRegression", "maxIter": 5}],
        "model": {"network": "mlp", "hidden": [4]},
        "train": {"ranks": 2, "batch_size": 16, "epochs": 4},
    }
    config.write_text(yaml.safe_dump(sections))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYSPARK", "SPARK_CONF", "MLFLOW", "OMP"))}
    environment["HEADRACE_LAKE"] = str(lake)
    found = Bench(lake, config, environment, before={}, seconds={}, wanted={})
    print(f"seed {SEED}")
    yield found


def measure(bench: Bench, jobs: list[str]) -> None:
    """Run the jobs undisturbed, once, keeping the lake as it was before each."""
    for job in jobs:
        if job not in bench.before:
            bench.before[job] = bench.lake.parent / f"before-{job}"
            shutil.copytree(bench.lake, bench.before[job])
            started = time.monotonic()
            bench.finish(job)
            bench.seconds[job] = time.monotonic() - started
    bench.wanted |= bench.made()


def trial(bench: Bench, job: str, signals: list[signal.Signals], seed: str) -> None:
    generator = random.Random(seed)
    bench.set_back(job)
    for how in signals:
        after_s = generator.uniform(0, bench.seconds[job])
        print(f"seed {seed}: {how.name} to {job} after {after_s:.2f} of {bench.seconds[job]:.2f} s")
        bench.interrupt(job, how, after_s)
    bench.finish(job)
    made = bench.made()
    for stage in bench.stages_of(job):
        assert made[stage] == bench.wanted[stage], stage
    assert not bench.left_over()
    assert not list(bench.lake.glob("tmp/*/*")), "scratch files of ended runs are removed"
    nothing_to_do = bench.finish(job)
    assert all("up to date" in line for line in nothing_to_do.splitlines())


def test_an_interrupted_and_a_killed_run_go_on(bench: Bench) -> None:
    """The short form: one run, interrupted once and killed once, then left alone."""
    measure(bench, ["run"])
    trial(bench, "run", [signal.SIGINT, signal.SIGKILL], f"{SEED}:short")


@pytest.mark.faults
@pytest.mark.parametrize("number", range(TRIALS))
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_stage_goes_on(bench: Bench, stage: str, how: signal.Signals, number: int) -> None:
    measure(bench, STAGES)
    trial(bench, stage, [how], f"{SEED}:{stage}:{how.name}:{number}")


FULL_DISK = """
set -e
mount -t tmpfs -o size=$SIZE tmpfs $HEADRACE_LAKE
cp $STORE $HEADRACE_LAKE/mlflow.db
set +e
$PYTHON $JOB $CONFIG; echo "first $?"
mount -o remount,size=1g $HEADRACE_LAKE
$PYTHON $JOB $CONFIG; echo "second $?"
"""


@pytest.mark.parametrize(
    ("job", "free_kb"),
    [("ingest", 100), *[pytest.param("run", free_kb, marks=pytest.mark.faults) for free_kb in (400, 800, 1600)]],
)
def test_a_full_disk(bench: Bench, session_lake: Path, job: str, free_kb: int) -> None:
    """On a small tmpfs of its own: one clear line, and the same command goes on once there is room."""
    store = session_lake / "mlflow.db"
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("needs the right to make a mount namespace")
    size = store.stat().st_size + free_kb * 1024
    environment = bench.environment | {
        "SIZE": str(size),
        "STORE": str(store),
        "PYTHON": sys.executable,
        "CONFIG": str(bench.config),
        "JOB": f"jobs/{job}.py",
    }
    done = subprocess.run(
        [*unshare, "sh", "-c", FULL_DISK], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    print(done.stdout, done.stderr)
    assert "first 1\n" in done.stdout and "second 0\n" in done.stdout
    assert done.stderr.count("error: ") == 1 and "the disk is full; free space" in done.stderr
    assert "Traceback" not in done.stderr
