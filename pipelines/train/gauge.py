"""What a rank measures of itself for its beats: memory, bytes on the wire, the pace of its steps. No torch."""

import time
from collections.abc import Callable, Mapping

import psutil
from pydantic import BaseModel, ConfigDict

from pipelines.train.diagnosis import busy_seconds
from pipelines.train.traffic import traffic

SMOOTHED_S = 3.0  # over which moving values move


class Measured(BaseModel):
    """What a rank measured.

    Attributes:
        memory_mb: Resident memory.
        sent_bytes: Over its TCP connections, since the rank began.
        received_bytes: Likewise.
        step_s: Seconds a step, a moving mean; 0 before the first.
        waiting_share: Share of the time that it waits for other ranks, a moving mean.
        still_s: How long it is at the same phase of the same step.
    """

    model_config = ConfigDict(frozen=True)

    memory_mb: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0
    step_s: float = 0.0
    waiting_share: float = 0.0
    still_s: float = 0.0

    @property
    def busy_step_s(self) -> float:
        """Seconds of a step in which it does not wait for others."""
        return self.step_s * (1.0 - self.waiting_share)


class Gauge:
    """Reads this process's values.

    Args:
        now: The clock, in seconds.
    """

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._process = now, psutil.Process()
        self._traffic, self._sent, self._received = traffic(), 0, 0
        self._ticks, self._ticked = 0, now()
        self._epoch: int | None = None
        self._last = (
            0,
            0.0,
            0.0,
        )  # steps of the epoch, its seconds and busy seconds when steps were last seen to be done
        self._step_s, self._waiting_share, self._is_warm = 0.0, 0.0, False

    def read(self, *, ticks: int, epoch: int, step: int, phases: Mapping[str, float]) -> Measured:
        """The values now.

        Args:
            ticks: Goes up whenever the phase changes.
            epoch: The epoch under way.
            step: The step of the epoch under way.
            phases: Seconds of the epoch so far, by phase.
        """
        now = self._now()
        if ticks != self._ticks:
            self._ticks, self._ticked = ticks, now
        if any(phases.values()):
            self._pace(epoch, (step, sum(phases.values()), busy_seconds(phases)))
        self._count_bytes()
        return Measured(
            memory_mb=self._process.memory_info().rss / 1e6,
            sent_bytes=self._sent,
            received_bytes=self._received,
            step_s=self._step_s,
            waiting_share=self._waiting_share,
            still_s=now - self._ticked,
        )

    def _count_bytes(self) -> None:
        """By what came on top since the last look, so that what a connection moved stays counted when it is closed."""
        seen = traffic()
        moved = seen.since(self._traffic)
        self._traffic, self._sent, self._received = seen, self._sent + moved.sent, self._received + moved.received

    def _pace(self, epoch: int, at: tuple[int, float, float]) -> None:
        """By the steps since they were last seen to be done.

        The first steps, which import and compile, do not count, nor does what lies between epochs, as validation.
        """
        if epoch != self._epoch:  # the first begins anywhere, where a run goes on from a checkpoint
            self._last = at if self._epoch is None else (0, 0.0, 0.0)
            self._epoch = epoch
        steps, elapsed, busy = (now - before for now, before in zip(at, self._last, strict=True))
        if steps <= 0 or elapsed <= 0:
            return
        self._last = at
        if self._is_warm:
            weight = min(1.0, elapsed / SMOOTHED_S) if self._step_s else 1.0
            self._step_s += weight * (elapsed / steps - self._step_s)
            self._waiting_share += weight * (1.0 - busy / elapsed - self._waiting_share)
        self._is_warm = True
