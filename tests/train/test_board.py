"""A training under way can be watched from another process, and a rank in trouble is named with numbers."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.config.learning import Model, Train
from pipelines.features.fitted import FittedFeatures, FittedLabel
from pipelines.lake import Snapshot
from pipelines.stage import Made
from pipelines.train.board import Board, alerts_of, look, rows_of
from pipelines.train.gauge import Gauge
from pipelines.train.heartbeat import Beat, Place
from pipelines.train.job import TrainJob
from pipelines.train.live import as_text
from tests.conftest import ROOT
from tests.tables import BINARY
from tests.train.conftest import plant, run_of

# A step takes 40 ms at least.
SLOWER = """
import os, time
if "RANK" in os.environ:
    from pipelines.train.clock import StepClock
    enter = StepClock.enter
    def slower(self, phase):
        if phase == "forward":
            time.sleep(0.04)
        enter(self, phase)
    StepClock.enter = slower
"""


def look_from_outside(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "jobs/watch.py", str(config), "--once", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def seen_from_outside(config: Path, is_due: Callable[[int, dict[str, Any]], bool]) -> dict[str, Any]:
    """Look until it is as wanted."""
    until = time.monotonic() + 60
    done = None
    while time.monotonic() < until:
        done = look_from_outside(config, "--format", "json")
        if done.stdout and is_due(done.returncode, board := json.loads(done.stdout)):
            return board
    raise AssertionError(done)


def test_a_training_is_watched_from_outside(
    train: Callable[..., Made],
    lake: Path,
    workload: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch, tmp_path / "slower", SLOWER)
    made: list[Made] = []
    config = workload("")
    nothing = look_from_outside(config)
    assert nothing.returncode == 1 and "wanted a training of tiny, seen none in the lake" in nothing.stderr
    training = threading.Thread(target=lambda: made.append(train(epochs=20, threads=1)))
    training.start()
    try:

        def works(code: int, board: dict[str, Any]) -> bool:
            return code == 0 and len(board["ranks"]) == 2 and all(rank["step_ms"] for rank in board["ranks"])

        board = seen_from_outside(config, works)
        assert board["state"] == "running" and board["steps"] == 8 and board["epochs"] == 20 and board["loss"] > 0
        for rank in board["ranks"]:
            assert rank["step_ms"] > 35 and 0 < rank["rows_per_s"] < 8 / 0.035 and rank["memory_mb"] > 50
            assert rank["sent_mb"] > 0 and rank["received_mb"] > 0 and rank["behind_steps"] <= 8
        stopped = psutil.Process(board["ranks"][1]["pid"])
        stopped.send_signal(signal.SIGSTOP)
        named = seen_from_outside(config, lambda code, board: code == 3 and board["alerts"][0]["kind"] == "silent")
        (alert,) = named["alerts"]
        assert alert["rank"] == 1 and f"process {stopped.pid} is stopped" in alert["text"]
        assert "rank 1 on " in alert["text"] and "no sign of life for " in alert["text"] and ", step " in alert["text"]
        time.sleep(2.5)  # the launcher looks each second, and tells what it sees twice
        os.kill(stopped.pid, signal.SIGCONT)
        live = subprocess.run(
            [sys.executable, "jobs/watch.py", str(config)], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
    finally:
        training.join()
    assert live.returncode == 0 and "tiny  is not running; the last training ended well" in live.stdout
    assert "RSS MB" in live.stdout and "\x1b" not in live.stdout
    assert made and not made[0].result["restarts"]
    run = run_of("tiny")
    assert run.data.metrics["rank_1/memory_mb"] > 50 and run.data.metrics["rank_0/step_ms"] > 35
    assert "rank 1 on " in run.data.tags["headrace.alert"] and "is stopped" in run.data.tags["headrace.alert"]
    of_run = look_from_outside(config, "--run", run.info.run_id, "--format", "json")
    last = json.loads(of_run.stdout)
    assert of_run.returncode == 0 and last["run_id"] == run.info.run_id
    assert [(rank["phase"], rank["epoch"]) for rank in last["ranks"]] == [("end", 19)] * 2
    assert all(rank["sent_mb"] > 0 for rank in last["ranks"]), "what closed connections moved counts as well"


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    """Two ranks and 8 lanes, 100 steps an epoch; nothing of it is on disk."""
    return TrainJob(
        workload="mnist",
        folder=tmp_path,
        model=Model(network="softmax"),
        train=Train(ranks=2, lanes=8, batch_size=64, epochs=5),
        seed=0,
        snapshot=Snapshot(table="t", version=0, files=(), contract=None, rows=6400, row_id_sum=0),
        validation=None,
        fitted=FittedFeatures(inputs=(), label=FittedLabel(spec=BINARY), columns={}),
        tracking_uri="",
        run_id="0a1b",
        keep_checkpoints=1,
    )


def beat(rank: int, *, lanes: str = "0 to 3", phase: str = "forward", step: int = 50, **measured: Any) -> Beat:
    place = Place(phase=phase, ticks=1, epoch=1, step=step, lanes=lanes)
    known = {"memory_mb": 812.4, "sent_bytes": 12_340_000, "received_bytes": 5_000_000, "step_s": 0.02}
    return Beat(rank=rank, host="node-a", pid=100 + rank, count=9, place=place, **(known | measured))


def board_of(job: TrainJob, beats: dict[int, Beat], ages: dict[int, float]) -> Board:
    ranks, alerts = rows_of(job, beats, ages), alerts_of(job, beats, ages)
    told = {"state": "running", "why": "", "ranks": ranks, "alerts": alerts, "epoch": 1, "step": 50}
    return look(job).model_copy(update=told)


def test_the_table(job: TrainJob) -> None:
    beats = {0: beat(0), 1: beat(1, lanes="4 to 7", phase="backward", waiting_share=0.25)}
    assert as_text(board_of(job, beats, {0: 0.1, 1: 0.4})).splitlines() == [
        "mnist  running  epoch 2/5, step 50/100  run 0a1b",
        "rank  host    pid  epoch  step  phase     ms/step  rows/s  waits  behind  beat s  RSS MB  sent MB  recv MB",
        "   0  node-a  100      2    50  forward      20.0   1,600     0%       0     0.1     812     12.3      5.0",
        "   1  node-a  101      2    50  backward     20.0   1,600    25%       0     0.4     812     12.3      5.0",
    ]
    stale = beat(1).model_copy(update={"place": beat(1).place.model_copy(update={"staleness": 1.26})})
    header, server, worker = as_text(board_of(job, {0: beat(0), 1: stale}, {0: 0.1, 1: 0.4})).splitlines()[1:]
    assert [line[header.index("stale") :].split()[0] for line in (header, server, worker)] == ["stale", "0.1", "1.3"]
    narrow = as_text(board_of(job, beats, {0: 0.1, 1: 7.0}), width=60).splitlines()
    assert max(map(len, narrow)) < 60 and "".join(narrow[4:]).startswith("rank 1 on node-a")


@pytest.mark.parametrize(
    ("measured", "ages", "alert"),
    [
        ({}, {0: 0.1, 1: 0.3}, None),
        ({}, {0: 0.1, 1: 7.3}, ("silent", "no sign of life for 7.3 s (stopped, or its machine is gone?)")),
        ({"phase": "data", "still_s": 21.0}, {0: 0.1, 1: 0.3}, ("stalled", "phase data, lanes 0 to 3, reading nothing: did not get on for 21 s")),
        ({"step_s": 0.045}, {0: 0.1, 1: 0.3}, ("slow", "slow, 45.0 ms of its own work a step, 3.0 times the others' 15.0 ms")),
        ({"phase": "start", "still_s": 60.0}, {0: 0.1, 1: 0.3}, None),
        ({"phase": "end"}, {0: 0.1, 1: 60.0}, None),
    ],
)  # fmt: skip
def test_who_is_in_trouble(
    job: TrainJob, measured: dict[str, Any], ages: dict[int, float], alert: tuple[str, str] | None
) -> None:
    alerts = alerts_of(job, {0: beat(0, waiting_share=0.25), 1: beat(1, **measured)}, ages)
    assert [(found.rank, found.kind) for found in alerts] == ([(1, alert[0])] if alert else [])
    assert not alert or (alerts[0].text.startswith("rank 1 on node-a, epoch 2, step 50") and alert[1] in alerts[0].text)


def test_the_rank_that_the_others_wait_for_is_named(job: TrainJob) -> None:
    waiting = {"phase": "backward", "still_s": 30.0}
    alerts = alerts_of(job, {0: beat(0, **waiting), 1: beat(1, step=49, **waiting)}, {0: 0.1, 1: 0.3})
    assert [(found.rank, found.kind) for found in alerts] == [(1, "stalled")]


def test_steps_behind(job: TrainJob) -> None:
    """Less than two beats' worth, 50 steps here, cannot be told from beats that come at different times."""
    ages = {0: 0.1, 1: 0.5}
    for step, behind in ((45, 0), (20, 60)):
        rows = rows_of(job, {0: beat(0, step=80), 1: beat(1, step=step)}, ages)
        assert [row.behind_steps for row in rows] == [0, behind]


def test_a_gauge() -> None:
    now = [0.0]
    gauge = Gauge(now=lambda: now[0])
    for beat_number in range(20):
        now[0] = beat_number / 2
        seconds = {"forward": now[0] * 0.6, "communication": now[0] * 0.4}
        seen = gauge.read(ticks=beat_number, epoch=0, step=5 * beat_number, phases=seconds)
    assert seen.step_s == pytest.approx(0.1) and seen.waiting_share == pytest.approx(0.4) and seen.memory_mb > 10
    assert seen.busy_step_s == pytest.approx(0.06) and seen.still_s == 0
    now[0] += 30
    later = gauge.read(ticks=19, epoch=0, step=95, phases=seconds)
    assert later.still_s == 30 and later.step_s == seen.step_s
    next_epoch = gauge.read(ticks=20, epoch=1, step=1, phases={"forward": 0.1, "communication": 0.0})
    assert next_epoch.step_s == pytest.approx(0.1) and 0.35 < next_epoch.waiting_share < 0.4
    resumed = Gauge()
    for step in (500, 501, 502):
        seen = resumed.read(
            ticks=step, epoch=3, step=step, phases={"forward": (step - 499) * 0.2, "communication": 0.0}
        )
    assert seen.step_s == pytest.approx(0.2)
