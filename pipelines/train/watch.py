"""The launcher's watch over the ranks: one that stands still is named, and all are ended.

A collective that waits for a rank tells nobody which. Here each rank tells where it is (heartbeat.py), on a path that
all nodes see, so that the one that the others wait for can be told from those that wait.
"""

import contextlib
import time
from collections.abc import Callable

import psutil

from pipelines.train.heartbeat import ENDED, LOGGING, Beat
from pipelines.train.job import TrainJob

STARTUP_S = 120.0  # importing torch on a cold machine, before the first beat
WORKER = "pipelines.train.worker"  # the module that a rank runs
WAITING_PHASES = ("backward", "communication", "other")  # in which a rank may wait for others
_SHARE = 0.8  # of train.timeout_s, so that a rank is named within it


class Watch:
    """Looks at the ranks' beats.

    Args:
        job: Whose ranks.
        now: The clock, in seconds.
    """

    def __init__(self, job: TrainJob, *, now: Callable[[], float] = time.monotonic) -> None:
        self._job, self._now = job, now
        self._began = now()
        self._alive: dict[int, tuple[int, float]] = {}  # rank: its count, and since when it is that
        self._moved: dict[int, tuple[int, float]] = {}  # rank: its ticks, and since when
        self.beats: dict[int, Beat] = {}

    def look(self) -> str:
        """Why the run must end, or nothing where all ranks get on."""
        now, limit = self._now(), _SHARE * self._job.train.timeout_s
        self.read_beats()
        if missing := [rank for rank in range(self._job.train.ranks) if rank not in self.beats]:
            late = now - self._began > STARTUP_S + limit
            return f"rank {missing[0]} did not start within {STARTUP_S + limit:.0f} s" if late else ""
        working = [beat for beat in self.beats.values() if beat.place.phase != ENDED]
        for beat in working:
            if (silent := now - self._alive[beat.rank][1]) > limit:
                others = [b.place for b in working if b.rank != beat.rank]
                at = max(((place.epoch, place.step) for place in others), default=None)
                seen = self.last_seen(beat.rank, at)
                return f"{seen}: gave no sign of life for {silent:.0f} s (stopped, or its machine is gone?)"
        stands = [beat.place.phase != LOGGING and now - self._moved[beat.rank][1] > limit for beat in working]
        if stands and all(stands):
            blamed = min(working, key=blame)
            return f"{blamed}: did not get on for {now - self._moved[blamed.rank][1]:.0f} s; the others wait for it"
        return ""

    def read_beats(self) -> None:
        """Take in the beats that there are."""
        self.beats |= self._job.beats()
        for rank, beat in self.beats.items():
            for seen, value in ((self._alive, beat.count), (self._moved, beat.place.ticks)):
                if rank not in seen or seen[rank][0] != value:
                    seen[rank] = (value, self._now())

    def last_seen(self, rank: int, at: tuple[int, int] | None) -> str:
        """A rank and where it was by its last beat, or at the epoch and step `at`, which others tell.

        Ranks go step by step together, so others know better than a beat that is half a second old.
        """
        beat = self.beats.get(rank)
        if beat is None:
            return f"rank {rank}"
        if at is not None:
            beat = beat.model_copy(update={"place": beat.place.model_copy(update={"epoch": at[0], "step": at[1]})})
        return str(beat)

    def end_local_ranks(self) -> None:
        """Kill this job's ranks on this machine, also those that are stopped or never gave a beat; what is killed is not
        started again.
        """
        with contextlib.suppress(OSError):
            self._job.ended_path.touch()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                command = process.cmdline()
                if command[-3:] == ["-m", WORKER, str(self._job.path)] and command.count("-m") == 1:  # no launcher
                    process.kill()


def blame(beat: Beat) -> tuple[bool, int, int]:
    """Least for the rank that the others wait for: one that does its own work, or is furthest behind."""
    return beat.place.phase in WAITING_PHASES, beat.place.epoch, beat.place.step
