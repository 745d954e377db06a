"""Interrupt a job of a tiny workload at some moment, and see what it leaves and whether the same command goes on."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipelines.lake import Snapshot
from tests.conftest import ROOT

STAGES = ["ingest", "features", "classic", "train", "evaluate", "register", "score"]
STARTED_S = 1.0  # before this, Python itself may be what is interrupted
SEED = int(os.environ.get("HEADRACE_FAULT_SEED") or random.SystemRandom().randrange(10**6))


@dataclass
class Bench:
    """A workload's jobs on a lake of their own."""

    lake: Path
    config: Path
    environment: dict[str, str]

    def start(self, job: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, f"jobs/{job}.py", str(self.config)],
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
        print(f"{how.name} to {job} after {after_s:.2f} s")
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

    def made(self) -> dict[str, Any]:
        """What the receipts say, without what differs from run to run."""
        found = {}
        for stage in STAGES:
            path = self.lake / "runs" / "tiny" / f"{stage}.json"
            if path.is_file():
                receipt = json.loads(path.read_text())
                found[stage] = (receipt["rows"], _stable(stage, receipt["result"]))
        return found

    def check_goes_on(self, stage: str, wanted: dict[str, Any]) -> None:
        """The same command makes what an undisturbed one made; nothing of the interrupted one is left."""
        self.finish(stage)
        assert self.made()[stage] == wanted[stage]
        assert not self.left_over()
        assert not list(self.lake.glob("tmp/*/*")), "scratch files are removed"
        assert "up to date" in self.finish(stage)

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


FULL_DISK = """
set -e
mount -t tmpfs -o size=$SIZE tmpfs $HEADRACE_LAKE
cp $STORE $HEADRACE_LAKE/mlflow.db
set +e
$PYTHON $JOB $CONFIG; echo "first $?"
mount -o remount,size=1g $HEADRACE_LAKE
$PYTHON $JOB $CONFIG; echo "second $?"
"""


def on_a_full_disk(bench: Bench, job: str, store: Path, *, free_kb: int) -> subprocess.CompletedProcess[str] | None:
    """Run the job twice on a small tmpfs of its own that grows in between; None where mounting is not allowed."""
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], check=False).returncode:
        return None
    environment = bench.environment | {
        "SIZE": str(store.stat().st_size + free_kb * 1024),
        "STORE": str(store),
        "PYTHON": sys.executable,
        "CONFIG": str(bench.config),
        "JOB": f"jobs/{job}.py",
    }
    command = [*unshare, "sh", "-c", FULL_DISK]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)


def check_full_disk(done: subprocess.CompletedProcess[str]) -> None:
    """One clear line, and the same command goes on once there is room."""
    print(done.stdout, done.stderr)
    assert "first 1\n" in done.stdout and "second 0\n" in done.stdout
    assert done.stderr.count("error: ") == 1 and "the disk is full; free space" in done.stderr
    assert "Traceback" not in done.stderr
