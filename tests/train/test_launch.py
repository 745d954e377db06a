"""The train stage on real torchrun ranks: only Petastorm feeds it, and a rank that ends is named."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipelines import tracking
from pipelines.config import load_config
from pipelines.errors import ConfigError, DataError, TrainingError
from pipelines.features.fitted import FittedFeatures, FittedInput, FittedLabel
from pipelines.lake import runs_path
from pipelines.receipt import Receipt
from pipelines.stage import Given, Made
from pipelines.train.launch import build
from tests.conftest import ROOT
from tests.tables import BINARY, DENSE, contract_of, feature_table

Workload = Callable[..., Path]

# Put on the ranks' PYTHONPATH as sitecustomize.py; rank 1 meets the fault.
BROKEN_PETASTORM = """
import os
if os.environ.get("RANK") == "1":
    from petastorm.arrow_reader_worker import ArrowReaderWorker
    def broken(*_):
        raise RuntimeError("planted in Petastorm's worker")
    ArrowReaderWorker._load_rows = broken
"""
KILLED_IN_EPOCH_2 = """
import os, signal
if os.environ.get("RANK") == "1":
    from pipelines.train.loop import Trainer
    epoch_of = Trainer._epoch
    def epoch_or_end(self, epoch):
        if epoch == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return epoch_of(self, epoch)
    Trainer._epoch = epoch_or_end
"""


@pytest.fixture
def train(lake: Path, workload: Workload) -> Callable[..., Made]:
    """Run the stage on a small table: `train(epochs=1)`, with settings of its section to replace."""
    snapshot = feature_table(lake / "tables" / "tiny" / "features" / "train", [70, 50], contract_of(DENSE))
    inputs = (FittedInput(name="dense", kind="dense", source="x", shape=(4,)),)
    fitted = FittedFeatures(inputs=inputs, label=FittedLabel(spec=BINARY))
    result = {"snapshots": {"train": snapshot.model_dump(mode="json")}, "fitted": fitted.model_dump(mode="json")}
    features = Receipt(stage="features", workload="tiny", digest="f", made_from={}, seconds=1, rows=120, result=result)

    def run(network: str = "softmax", digest: str = "d" * 64, **settings: object) -> Made:
        section = {"ranks": 2, "batch_size": 16, "epochs": 3, "launcher": "torchrun", "timeout_s": 60} | settings
        config = load_config(workload("", model={"network": network}, train=section, classic=[]))
        with tracking.start_run("tiny", "train", parent=None) as mlflow_run:
            return build(Given(config=config, inputs={"features": features}, run=mlflow_run, digest=digest))

    return run


def plant(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")


def test_nothing_but_petastorm_feeds_training(
    train: Callable[..., Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, tmp_path / "fault", BROKEN_PETASTORM)
    with pytest.raises(
        TrainingError, match="rank 1 on .*: RuntimeError: planted in Petastorm's worker; the ranks' log"
    ):
        train()


def test_a_killed_rank_is_named_and_the_same_call_goes_on(
    train: Callable[..., Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, tmp_path / "fault", KILLED_IN_EPOCH_2)
    with pytest.raises(TrainingError, match=r"rank 1 ended without a word .*; the ranks' log: "):
        train()
    monkeypatch.delenv("PYTHONPATH")
    made = train()
    assert "went on from the checkpoint behind epoch 1" in made.lines
    epochs = made.result["epochs"]
    assert [epoch["epoch"] for epoch in epochs] == [0, 1, 2] and {epoch["rows"] for epoch in epochs} == {120}
    assert made.rows == 360 and tracking.model_exists(made.outputs[0])
    checkpoints = sorted(path.name for path in runs_path("tiny").glob("train/*/epoch-*"))
    assert checkpoints == ["epoch-0001", "epoch-0002"], "keep.checkpoints is 2"


def test_a_wrong_network_is_a_config_error(train: Callable[..., Made]) -> None:
    with pytest.raises(ConfigError, match=r"model\.network: wanted a class at tests\.networks:Missing"):
        train(network="tests.networks:Missing")


def test_fewer_rows_than_lanes_are_refused(train: Callable[..., Made]) -> None:
    with pytest.raises(DataError, match=r"a row for each of the 128 lanes, seen 120 rows; lower train\.lanes"):
        train(batch_size=128, lanes=128)


def test_no_rank_outlives_the_launcher(train: Callable[..., Made], lake: Path) -> None:
    """The ranks of a launcher that is killed end with it."""

    def ranks() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if "pipelines.train.worker" in command and str(lake) in command[-1]:
                found.append(process)
        return found

    launcher = multiprocessing.get_context("fork").Process(target=train, kwargs={"epochs": 100_000})
    launcher.start()
    deadline = time.monotonic() + 60
    while not list(runs_path("tiny").glob("train/*/epoch-*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(ranks()) >= 2
    os.kill(launcher.pid or 0, signal.SIGKILL)
    launcher.join()
    deadline = time.monotonic() + 30
    while ranks() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not ranks()
