"""The train stage on a small table."""

import contextlib
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines import tracking
from pipelines.config import load_config
from pipelines.features.fitted import FittedFeatures, FittedInput, FittedLabel, FittedVector
from pipelines.lake import Snapshot, runs_path
from pipelines.receipt import Receipt
from pipelines.stage import Given, Made
from pipelines.train.heartbeat import Beat
from pipelines.train.launch import build
from tests.conftest import ROOT
from tests.faults import SEED
from tests.tables import BINARY, DENSE, contract_of, feature_table

Workload = Callable[..., Path]
Result = dict[str, Any]


@pytest.fixture
def train(lake: Path, workload: Workload) -> Callable[..., Made]:
    """Run the stage on a small table: `train(epochs=1)`, with settings of its section to replace."""
    table = feature_table(lake / "tables" / "tiny" / "features" / "train", [70, 50], contract_of(DENSE))
    inputs = (FittedInput(name="dense", kind="dense", whole=FittedVector(source="x", width=4)),)
    fitted = FittedFeatures(inputs=inputs, label=FittedLabel(spec=BINARY), columns={"x": "array<float>"})

    def run(
        network: str | dict[str, object] = "softmax", snapshots: dict[str, Snapshot] | None = None, **settings: object
    ) -> Made:
        splits = {name: split.model_dump(mode="json") for name, split in (snapshots or {"train": table}).items()}
        result = {"snapshots": splits, "fitted": fitted.model_dump(mode="json")}
        features = Receipt(
            stage="features", workload="tiny", digest="f", made_from={}, seconds=1, rows=1, result=result
        )
        section = {"ranks": 2, "batch_size": 16, "epochs": 3, "launcher": "torchrun", "timeout_s": 60} | settings
        config = load_config(
            workload(
                "", model=network if isinstance(network, dict) else {"network": network}, train=section, classic=[]
            )
        )
        with tracking.start_run("tiny", "train", parent=None) as mlflow_run:
            given = Given(config=config, inputs={"features": features}, run=mlflow_run, made_from={})
            return build(given)

    return run


def beat_of(rank: int) -> Beat | None:
    paths = list(runs_path("tiny").glob(f"train/*/beat-rank-{rank}.json"))
    try:
        return Beat.model_validate_json(paths[0].read_bytes()) if paths else None
    except (OSError, ValueError):
        return None


@pytest.fixture
def signalled() -> Iterator[Callable[..., None]]:
    """Send a rank's process a signal at an epoch and a step, or behind them."""
    threads, done = [], threading.Event()

    def send(rank: int, sign: int, *, epoch: int = 0, step: int = 0, watch: int | None = None) -> None:
        def wait_and_send() -> None:
            while not done.wait(0.005):
                seen, target = beat_of(rank if watch is None else watch), beat_of(rank)
                if seen and target and (seen.place.epoch, seen.place.step) >= (epoch, step) and seen.place.ticks > 0:
                    return os.kill(target.pid, sign)

        threads.append(threading.Thread(target=wait_and_send))
        threads[-1].start()

    yield send
    done.set()
    for thread in threads:
        thread.join()


@dataclass
class Killing:
    """When there first was a process to kill, by time.monotonic(), and the id of the one that was killed."""

    since: float = math.inf
    pid: int | None = None


@contextlib.contextmanager
def killed_at(after_s: float, victim: Callable[[], psutil.Process | None]) -> Iterator[Killing]:
    """Kill what `victim` names, that long after it first named one; nothing where that is infinite."""
    done, seen = threading.Event(), Killing()

    def kill() -> None:
        while not victim():
            if done.wait(0.05):
                return
        seen.since = time.monotonic()
        while not done.wait(min(threading.TIMEOUT_MAX, max(0.01, seen.since + after_s - time.monotonic()))):
            process = victim()
            if process:
                with contextlib.suppress(psutil.Error):
                    process.kill()
                    seen.pid = process.pid
                    return

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def children_that(match: Callable[[list[str]], bool]) -> list[psutil.Process]:
    """Processes below this one, by their command lines."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if match(process.cmdline()):
                found.append(process)
    return found


def trained_under_kills(
    name: str, kills: int, train: Callable[[], Result], victims: Callable[[], list[psutil.Process]]
) -> tuple[Result, list[Result]]:
    """What `train` makes undisturbed, and so often with one of the victims killed while there are any: rows as receipted.

    Moments are drawn uniformly over the wall time from the first victim to the end of an undisturbed run.
    """
    generator, chosen_by = random.Random(f"{SEED}:{name}"), random.Random(f"{SEED}:{name}:whom")
    results = []

    def victim() -> psutil.Process | None:
        found = victims()
        return chosen_by.choice(found) if found else None

    with killed_at(math.inf, victim) as seen:
        whole = train()
    wall_s = time.monotonic() - seen.since
    receipts = [(epoch["rows"], epoch["row_id_sum"]) for epoch in whole["epochs"]]
    print(f"seed {SEED}; {name}; undisturbed {wall_s:.1f} s")
    for number in range(kills):
        after_s = generator.uniform(0, wall_s)
        with killed_at(after_s, victim) as seen:
            results.append(train())
        result = results[-1]
        repeated = sum(epoch["exchange"].get("repeated_rows", 0) for epoch in result["epochs"])
        print(
            f"{number}: {seen.pid} after {after_s:.2f} s; {repeated:g} rows repeated; {result['restarts']}", flush=True
        )
        assert [(epoch["rows"], epoch["row_id_sum"]) for epoch in result["epochs"]] == receipts
    return whole, results


def plant(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")


def run_of(workload: str) -> Any:
    """The workload's only MLflow run."""
    client = tracking.mlflow_client()
    (run,) = client.search_runs([client.get_experiment_by_name(workload).experiment_id])
    return run


def weights_of(made: Made, tmp_path: Path) -> dict[str, list[float]]:
    """The weights of the logged model."""
    network = tracking.load_torch(str(tracking.download(made.outputs[0], tmp_path)))
    return {name: tensor.tolist() for name, tensor in network.state_dict().items()}


def rank_processes(lake: Path) -> list[psutil.Process]:
    """The ranks that train in the lake."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "pipelines.train.worker" in command and str(lake) in command[-1]:
            found.append(process)
    return found
