"""Load balancing: lanes move to the ranks that are fast, at a step boundary."""

import time

import torch
import torch.distributed as dist

from pipelines.stream import Batch, LaneLoader
from pipelines.stream.assignment import balance_lanes
from pipelines.train.clock import StepClock
from pipelines.train.pace import Pace

LOOK_EVERY_S = 2.0
LEAD_S = 0.5  # a rank's new lanes are read ahead for so long
WORTH_RATIO = 1.1  # what the slowest rank's step must gain


class Balance:
    """Measures the ranks' speeds and moves lanes when the slowest rank would gain a tenth of its time.

    A rank's speed is its rows in a second in which it does not wait for others.

    Args:
        loader: Whose lanes move.
        clock: Knows the time of this rank.
        device: Where collectives take place.
    """

    def __init__(self, loader: LaneLoader, clock: StepClock, device: torch.device) -> None:
        self._loader, self._clock, self._device = loader, clock, device
        self._pace = Pace(LOOK_EVERY_S, device)
        self._rows, self._busy_before, self._since, self._from_step = 0, 0.0, 0.0, 0

    def start(self, step: int) -> None:
        """An epoch begins, or goes on, with `step`."""
        self._pace.start(step)
        self._begin(step)

    def look(self, batch: Batch) -> None:
        """Behind a batch: move lanes where it is worth it; collective at steps that all ranks know."""
        self._rows += batch.rows
        step = batch.step + 1
        if not self._pace.is_due(step):
            return
        rows_per_s = self._rows / max(self._clock.busy - self._busy_before, 1e-6)
        per_step = (time.monotonic() - self._since) / (step - self._from_step)
        told = torch.tensor([rows_per_s, per_step], dtype=torch.float64, device=self._device)
        gathered = [torch.empty_like(told) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, told)
        speeds = [max(float(part[0]), 1e-3) for part in gathered]
        lanes = self._decided(speeds)
        if lanes is not None:
            self._loader.reassign(lanes, at_step=step + max(2, int(LEAD_S / float(gathered[0][1]))))
        self._begin(step)

    def _decided(self, speeds: list[float]) -> list[range] | None:
        """The new lanes of each rank, or None; rank 0 decides, since a solver's time limit is not the same anywhere."""
        counts = torch.zeros(len(speeds), dtype=torch.int64, device=self._device)
        if dist.get_rank() == 0:
            found = balance_lanes(self._loader.lanes, speeds)
            longest_now = max(len(lanes) / v for lanes, v in zip(self._loader.assignment, speeds, strict=True))
            longest_then = max(len(lanes) / v for lanes, v in zip(found, speeds, strict=True))
            if longest_now > WORTH_RATIO * longest_then:
                counts = torch.tensor([len(lanes) for lanes in found], device=self._device)
        dist.broadcast(counts, 0)
        if not int(counts.sum()):
            return None
        ends = counts.cumsum(0).tolist()
        return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def _begin(self, step: int) -> None:
        self._rows, self._busy_before = 0, self._clock.busy
        self._since, self._from_step = time.monotonic(), step
