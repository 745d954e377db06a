"""Load balancing: lanes move to the ranks that are fast, at a step boundary."""

import torch
import torch.distributed as dist

from pipelines.assignment import balance_lanes
from pipelines.stream import Batch, LaneLoader
from pipelines.train.clock import StepClock
from pipelines.train.pace import Pace

LOOK_EVERY_S = 2.0
LEAD_S = 0.5  # a rank's new lanes are read ahead for so long
WORTH_RATIO = 1.1  # what the slowest rank's step must gain


class Balance:
    """Measures the ranks' speeds and moves lanes when the slowest rank would gain a tenth of its time.

    A rank's speed is its rows in a second in which it does not wait for others, over epochs where they are short. The
    first batch behind a start or a move, which waits for its reader, does not count.

    Args:
        loader: Whose lanes move.
        clock: Knows the time of this rank.
        device: Where collectives take place.
    """

    def __init__(self, loader: LaneLoader, clock: StepClock, device: torch.device) -> None:
        self._loader, self._clock, self._device = loader, clock, device
        self._pace = Pace(LOOK_EVERY_S, device)
        self._first_step = 0  # of the lanes that the rank has, or is about to have
        self._rows, self._seconds, self._busy_before = 0, 0.0, 0.0

    def start(self, step: int) -> None:
        """An epoch begins, or goes on, with `step`."""
        self._pace.start(step, counts_on=True)
        self._first_step, self._busy_before = step, self._clock.busy

    def look(self, batch: Batch) -> None:
        """Behind a batch: move lanes where it is worth it; collective at steps that all ranks know."""
        seconds, self._busy_before = self._clock.busy - self._busy_before, self._clock.busy
        if batch.step <= self._first_step:
            return
        self._rows, self._seconds = self._rows + batch.rows, self._seconds + seconds
        step = batch.step + 1
        if not self._pace.is_due(step):
            return
        rows_per_s = self._rows / max(self._seconds, 1e-6)
        told = torch.tensor([rows_per_s], dtype=torch.float64, device=self._device)
        gathered = [torch.empty_like(told) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, told)
        lanes = self._decided([max(float(speed), 1e-3) for speed in gathered])
        if lanes is not None:
            lead_steps = int(LEAD_S / LOOK_EVERY_S * self._pace.steps_to_next)
            self._first_step = step + max(2, lead_steps)
            self._loader.reassign(lanes, at_step=self._first_step)
        self._rows, self._seconds = 0, 0.0

    def _decided(self, speeds: list[float]) -> list[range] | None:
        """The new lanes of each rank, or None; alike on all ranks, since all know the same speeds."""
        found = balance_lanes(self._loader.lanes, speeds)
        longest_now = max(len(lanes) / v for lanes, v in zip(self._loader.assignment, speeds, strict=True))
        longest_then = max(len(lanes) / v for lanes, v in zip(found, speeds, strict=True))
        return found if longest_now > WORTH_RATIO * longest_then else None
