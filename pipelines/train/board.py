"""How a training stands: a row for each rank from its last beat, and who is dead, silent, stalled or slow. No torch."""

import contextlib
import json
import math
import socket
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel, ConfigDict

from pipelines.config.load import lake_root
from pipelines.lake import runs_path
from pipelines.train.heartbeat import BEAT_EVERY_S, ENDED, LOGGING, STARTING, Beat
from pipelines.train.job import JOB_FILE, EpochResult, TrainJob
from pipelines.train.watch import WAITING_PHASES, blame

SILENT_S = 5.0  # ten beats
STALLED_S = 15.0
SLOW_RATIO = 1.5
GONE_S = 10.0  # a launcher that gave no sign for so long was killed


class RankRow(BaseModel):
    """A rank by its last beat.

    Attributes:
        phase: What it is at.
        step_ms: Milliseconds a step.
        rows_per_s: Of its lanes.
        waiting_share: Share of its time in which it waits for other ranks.
        sent_mb: Over its TCP connections, since it began.
        received_mb: Likewise.
        behind_steps: Behind the furthest rank.
        staleness: Updates of the weights that a worker's gradients are behind.
        beat_age_s: Since its last beat.
    """

    model_config = ConfigDict(frozen=True)

    rank: int
    host: str
    pid: int
    epoch: int
    step: int
    phase: str
    step_ms: float
    rows_per_s: float
    waiting_share: float
    memory_mb: float
    sent_mb: float
    received_mb: float
    behind_steps: int
    staleness: float | None
    beat_age_s: float


class Alert(BaseModel):
    """A rank that needs a look, with numbers."""

    model_config = ConfigDict(frozen=True)

    rank: int
    kind: Literal["dead", "silent", "stalled", "slow"]
    text: str


class Board(BaseModel):
    """How a training stands.

    Attributes:
        state: `failed` where nobody follows the ranks and they left no result.
        step: Of `steps`, where the ranks last told.
        why: Why it failed.
        verdict: Where the last whole epoch's time went.
    """

    model_config = ConfigDict(frozen=True)

    workload: str
    run_id: str
    state: Literal["running", "ended", "failed"]
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float | None
    ranks: list[RankRow]
    alerts: list[Alert]
    verdict: str
    why: str


def latest_job(workload: str) -> TrainJob | None:
    """The workload's training that began last, under way or not."""
    found = sorted((runs_path(workload) / "train").glob(f"*/{JOB_FILE}"), key=lambda path: path.stat().st_mtime)
    return TrainJob.model_validate_json(found[-1].read_bytes()) if found else None


def job_of_run(run_id: str) -> TrainJob | None:
    """The training of this lake that is logged in a run of MLflow."""
    for path in (lake_root() / "runs").glob(f"*/train/*/{JOB_FILE}"):
        if run_id in (content := path.read_text(encoding="utf-8")):
            job = TrainJob.model_validate_json(content)
            if job.run_id == run_id:
                return job
    return None


def look(job: TrainJob) -> Board:
    """How the job stands now, from what its ranks left in its folder."""
    now, beats = time.time(), job.beats()
    ages = {rank: _age(job.beat_path(rank), now) for rank in beats}
    beats = {rank: beat for rank, beat in beats.items() if math.isfinite(ages[rank])}  # a restart removes them
    is_followed = _age(job.launcher_path, now) < GONE_S
    state: Literal["running", "ended", "failed"] = "running" if is_followed else "failed"
    if job.result_path.is_file() and not is_followed:
        state = "ended"
    done, progress = _epochs(job), _progress(job)
    return Board(
        workload=job.workload,
        run_id=job.run_id,
        state=state,
        epoch=int(progress.get("epoch", 0)),
        epochs=job.train.epochs,
        step=int(progress.get("step", 0)),
        steps=job.steps,
        loss=progress.get("loss"),
        ranks=rows_of(job, beats, ages),
        alerts=alerts_of(job, beats, ages) if state == "running" else [],
        verdict=done[-1].verdict if done else "",
        why=_why(job) if state == "failed" else "",
    )


def rows_of(job: TrainJob, beats: dict[int, Beat], ages: dict[int, float]) -> list[RankRow]:
    """A row for each rank that gave a beat, `ages` seconds ago."""
    lane_rows = job.train.batch_size / job.train.num_lanes
    behind = _behind(job, beats)
    return [
        RankRow(
            rank=rank,
            host=beat.host,
            pid=beat.pid,
            epoch=beat.place.epoch,
            step=beat.place.step,
            phase=beat.place.phase,
            step_ms=1000 * beat.step_s,
            rows_per_s=beat.place.num_lanes * lane_rows / beat.step_s if beat.step_s else 0.0,
            waiting_share=beat.waiting_share,
            memory_mb=beat.memory_mb,
            sent_mb=beat.sent_bytes / 1e6,
            received_mb=beat.received_bytes / 1e6,
            behind_steps=behind[rank],
            staleness=beat.place.staleness,
            beat_age_s=ages[rank],
        )
        for rank, beat in sorted(beats.items())
    ]


def _behind(job: TrainJob, beats: dict[int, Beat]) -> dict[int, int]:
    """Steps behind the furthest rank; 0 where it is less than two beats' worth, since beats are told at different times."""
    working = {rank: beat for rank, beat in beats.items() if beat.place.phase not in (STARTING, LOGGING, ENDED)}
    told = {rank: beat.place.epoch * job.steps + beat.place.step for rank, beat in working.items()}
    found = dict.fromkeys(beats, 0)
    for rank, beat in working.items():
        steps = max(told.values()) - told[rank]
        found[rank] = steps if steps * beat.step_s > 2 * BEAT_EVERY_S else 0
    return found


def alerts_of(job: TrainJob, beats: dict[int, Beat], ages: dict[int, float]) -> list[Alert]:
    """The ranks to look at: those that are gone; else those that stand still; else those that are slow."""
    working = [beat for beat in beats.values() if beat.place.phase != ENDED]
    gone = [alert for beat in working if (alert := _gone(job, beat, ages[beat.rank]))]
    at_work = [beat for beat in working if beat.place.phase not in (STARTING, LOGGING)]
    return gone or _stalled(at_work) or _slow(at_work)


def _gone(job: TrainJob, beat: Beat, age_s: float) -> Alert | None:
    try:
        process = _local_process(job, beat)
        is_stopped = process is not None and process.status() == psutil.STATUS_STOPPED
    except psutil.Error:  # it ends just now; the next look tells
        return None
    if beat.host == socket.gethostname() and process is None:
        return Alert(rank=beat.rank, kind="dead", text=f"{beat}: its process {beat.pid} is gone")
    if is_stopped or age_s > SILENT_S:
        why = f"process {beat.pid} is stopped" if is_stopped else "stopped, or its machine is gone?"
        return Alert(rank=beat.rank, kind="silent", text=f"{beat}: no sign of life for {age_s:.1f} s ({why})")
    return None


def _local_process(job: TrainJob, beat: Beat) -> psutil.Process | None:
    """The rank's process, where it is this machine's and still there."""
    with contextlib.suppress(psutil.NoSuchProcess):
        if beat.host == socket.gethostname() and str(job.folder) in " ".join(psutil.Process(beat.pid).cmdline()):
            return psutil.Process(beat.pid)
    return None


def _stalled(at_work: Sequence[Beat]) -> list[Alert]:
    """Ranks that do not get on with work of their own; where all wait for one another, the one that is furthest behind."""
    still = [beat for beat in at_work if beat.still_s > STALLED_S]
    blamed = [beat for beat in still if beat.place.phase not in WAITING_PHASES]
    if still and not blamed and len(still) == len(at_work):
        blamed = [min(still, key=blame)]
    return [
        Alert(rank=beat.rank, kind="stalled", text=f"{beat}: did not get on for {beat.still_s:.0f} s")
        for beat in blamed
    ]


def _slow(at_work: Sequence[Beat]) -> list[Alert]:
    """Ranks whose own work takes much longer than that of the others."""
    found = []
    for beat in at_work:
        others = [other.busy_step_s for other in at_work if other.rank != beat.rank and other.step_s]
        usual = statistics.median(others) if others else 0.0
        if usual and beat.busy_step_s > SLOW_RATIO * usual:
            text = (
                f"{beat}: slow, {1000 * beat.busy_step_s:.1f} ms of its own work a step, "
                f"{beat.busy_step_s / usual:.1f} times the others' {1000 * usual:.1f} ms"
            )
            found.append(Alert(rank=beat.rank, kind="slow", text=text))
    return found


def _age(path: Path, now: float) -> float:
    """Seconds since the file was written; infinite where it is not there."""
    try:
        return max(0.0, now - path.stat().st_mtime)
    except OSError:
        return float("inf")


def _epochs(job: TrainJob) -> list[EpochResult]:
    try:
        lines = job.epochs_path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError:
        return []
    return [EpochResult.model_validate_json(line) for line in lines if line.endswith("\n")]


def _progress(job: TrainJob) -> dict[str, float]:
    try:
        found: dict[str, float] = json.loads(job.progress_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _why(job: TrainJob) -> str:
    told = [error for error in job.errors() if error.cause != "ended"]
    why = f"rank {told[0].rank} on {told[0].host}, {told[0].place}: {told[0].message}" if told else "it left no result"
    return f"{why}; the ranks' log: {job.log_path}"
