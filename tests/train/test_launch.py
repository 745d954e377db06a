"""The train stage on real torchrun ranks: only Petastorm feeds it, and a rank that ends is named."""

import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from pipelines.errors import ConfigError, DataError, TrainingError
from pipelines.lake import runs_path
from pipelines.receipt import write_json
from pipelines.stage import Made
from pipelines.train import launch, watch
from pipelines.train.heartbeat import ENDED, LOGGING, Beat, Place
from pipelines.train.job import RankError
from pipelines.train.watch import Watch
from tests.tables import DENSE, contract_of, feature_table
from tests.train.conftest import plant, rank_processes, run_of, weights_of
from tests.train.test_loop import job_of

# Put on the ranks' PYTHONPATH as sitecustomize.py; rank 1 meets the fault.
BROKEN_PETASTORM = """
import os
if os.environ.get("RANK") == "1":
    from petastorm.arrow_reader_worker import ArrowReaderWorker
    def broken(*_):
        raise RuntimeError("planted in Petastorm's worker")
    ArrowReaderWorker._load_rows = broken
"""
# Rank 1 meets the fault when it first comes to step 3 of epoch 1; a file keeps that it did.
FAULT = """
import os, signal, time
from pathlib import Path
if os.environ.get("RANK") == "1":
    from pipelines.train.loop import Trainer
    on_device = Trainer._on_device
    def on_device_or_fault(self, batch):
        if (self.loader.epoch, batch.step) == (1, 3) and not Path({met!r}).exists():
            Path({met!r}).touch()
            {fault}
        return on_device(self, batch)
    Trainer._on_device = on_device_or_fault
"""
STOP, KILL, HANG = "os.kill(os.getpid(), signal.SIGSTOP)", "os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(600)"


def test_nothing_but_petastorm_feeds_training(
    train: Callable[..., Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, tmp_path / "fault", BROKEN_PETASTORM)
    with pytest.raises(
        TrainingError, match="rank 1 on .*: RuntimeError: planted in Petastorm's worker; the ranks' log"
    ):
        train(max_restarts=0)


def test_a_killed_rank_is_named_and_the_same_call_goes_on(
    train: Callable[..., Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = weights_of(train(batch_size=8, epochs=2), tmp_path / "undisturbed")
    shutil.rmtree(runs_path("tiny"))
    plant(monkeypatch, tmp_path / "fault", FAULT.format(met=str(tmp_path / "met"), fault=KILL))
    settings = {"batch_size": 8, "epochs": 2, "checkpoint": {"every_steps": 2}}
    with pytest.raises(
        TrainingError, match=r"rank 1 on .*, epoch 2, step 3.*: ended without a word .*; the ranks' log: "
    ):
        train(max_restarts=0, **settings)
    capsys.readouterr()
    made = train(max_restarts=0, **settings)
    told = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert told[0] == "goes on from the checkpoint at epoch 2, step 2" and told[1].startswith("epoch 2/2: ")
    assert "went on from the checkpoint at epoch 2, step 2" in made.lines
    epochs = made.result["epochs"]
    assert [epoch["epoch"] for epoch in epochs] == [0, 1] and {epoch["rows"] for epoch in epochs} == {120}
    assert made.rows == 240 and weights_of(made, tmp_path / "resumed") == undisturbed
    checkpoints = sorted(path.name for path in runs_path("tiny").glob("train/*/epoch-*"))
    assert checkpoints == ["epoch-0001-step-00000014", "epoch-0002-step-00000000"], "keep.checkpoints is 2"


@pytest.mark.parametrize(
    ("fault", "launcher"),
    [
        (STOP, "torchrun"),
        pytest.param(KILL, "spark", marks=pytest.mark.faults),
        pytest.param(HANG, "torchrun", marks=pytest.mark.faults),
        pytest.param(KILL, "torchrun", marks=pytest.mark.faults),
        pytest.param(STOP, "spark", marks=pytest.mark.faults),
        pytest.param(HANG, "spark", marks=pytest.mark.faults),
    ],
)
def test_a_lost_rank_is_named_in_time_and_the_run_starts_again(
    train: Callable[..., Made],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    fault: str,
    launcher: str,
) -> None:
    if launcher == "spark":
        request.getfixturevalue("spark")
    plant(monkeypatch, tmp_path / "fault", FAULT.format(met=str(tmp_path / "met"), fault=fault))
    made = train(launcher=launcher, timeout_s=12, epochs=2, checkpoint={"every_steps": 2})
    (why,) = made.result["restarts"]
    what = {
        KILL: "ended without a word",
        STOP: r"gave no sign of life for (9|1\d) s",
        HANG: r"did not get on for (9|1\d) s; the others wait for it",
    }
    where = r"rank 1 on \S+, epoch 2, step 3, phase \S+, lanes 8 to 15, reading .*"
    assert re.match(rf"{where}: {what[fault]}", why)
    assert [(epoch["epoch"], epoch["rows"]) for epoch in made.result["epochs"]] == [(0, 120), (1, 120)]
    assert "starts again from the last checkpoint (1 of 2)" in capfd.readouterr().out
    assert why in run_of("tiny").data.tags["headrace.alert"]


@pytest.mark.faults
def test_another_number_of_ranks_goes_on_with_the_same_job(
    train: Callable[..., Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, tmp_path / "fault", FAULT.format(met=str(tmp_path / "met"), fault=KILL))
    with pytest.raises(TrainingError, match="ended without a word"):
        train(max_restarts=0)
    made = train(ranks=1)
    assert "went on from the checkpoint at epoch 2, step 0" in made.lines


@pytest.mark.parametrize("dealt", ["0", "0.5", "2"])
def test_who_wants_gpus_of_a_cluster_that_does_not_deal_one_a_rank_is_told(dealt: str) -> None:
    wanted = rf"train.device: cuda: wanted spark.task.resource.gpu.amount 1 in \S+, .*seen {re.escape(dealt)} "
    with pytest.raises(ConfigError, match=wanted):
        launch._uses_gpu("cuda", dealt)
    assert not launch._uses_gpu("auto", dealt) and launch._uses_gpu("auto", "1") and not launch._uses_gpu("cpu", "1")


def test_ranks_that_never_start_are_ended(
    train: Callable[..., Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, tmp_path / "fault", 'import os, time\nif "RANK" in os.environ: time.sleep(600)')
    monkeypatch.setattr(watch, "STARTUP_S", 1.0)
    with pytest.raises(TrainingError, match="rank 0 did not start within 5 s"):
        train(max_restarts=0, timeout_s=5)


@pytest.mark.parametrize(("phase", "is_ended"), [("forward", True), (LOGGING, False)])
def test_who_logs_the_model_gets_on(tmp_path: Path, phase: str, is_ended: bool) -> None:
    job, now = job_of(tmp_path / "job", feature_table(tmp_path / "t", [40], contract_of(DENSE)), ranks=2), [0.0]
    looking = Watch(job, now=lambda: now[0])
    verdicts = []
    for now[0] in range(0, 600, 10):
        for rank, at in ((0, phase), (1, ENDED)):
            beat = Beat(rank=rank, host="h", pid=1, count=int(now[0]), place=Place(phase=at, ticks=7))
            write_json(job.beat_path(rank), beat)
        verdicts.append(looking.look())
    assert bool(verdicts[-1]) == is_ended


@pytest.mark.parametrize("cause", ["known", "unforeseen"])
def test_a_cause_is_told_whatever_its_words(tmp_path: Path, cause: Literal["known", "unforeseen"]) -> None:
    """A lost peer is what follows; a file of the name is not."""
    job = job_of(tmp_path / "job", feature_table(tmp_path / "t", [40], contract_of(DENSE)), ranks=2)
    error = RankError(
        rank=1, host="h", place=Place(), cause=cause, message="peerings/part-3 cannot be read", exit_code=1
    )
    write_json(job.error_path(1), error)
    told = str(launch._why_failed(job, Watch(job), "", ""))
    assert ("peerings/part-3 cannot be read" in told) == (cause == "known")


def test_a_wrong_network_is_a_config_error(train: Callable[..., Made]) -> None:
    with pytest.raises(ConfigError, match=r"model\.network: wanted a class at tests\.networks:Missing"):
        train(network="tests.networks:Missing")


def test_fewer_rows_than_lanes_are_refused(train: Callable[..., Made]) -> None:
    with pytest.raises(DataError, match=r"a row for each of the 128 lanes, seen 120 rows; lower train\.lanes"):
        train(batch_size=128, lanes=128)


def test_no_rank_outlives_the_launcher(train: Callable[..., Made], lake: Path) -> None:
    """The ranks of a launcher that is killed end with it."""
    launcher = multiprocessing.get_context("fork").Process(target=train, kwargs={"epochs": 100_000})
    launcher.start()
    deadline = time.monotonic() + 60
    while not list(runs_path("tiny").glob("train/*/epoch-*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert len(rank_processes(lake)) >= 2
    os.kill(launcher.pid or 0, signal.SIGKILL)
    launcher.join()
    deadline = time.monotonic() + 30
    while rank_processes(lake) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not rank_processes(lake)
