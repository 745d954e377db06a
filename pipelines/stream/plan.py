"""EpochPlan: which rows are read in which order, as a pure function. No I/O, no torch, no petastorm.

A shard is one row group of one file of a Snapshot. An epoch permutes the shards, groups them into windows of a
few, and permutes the rows inside each window; that gives one sequence of all rows. The sequence is cut into C
contiguous lanes, which differ by at most one row. Global batch t takes rows [t*b, (t+1)*b) of every lane, lane by
lane, with b = B / C. Nothing depends on the number of ranks, the machine or a global generator.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
_SHARDS, _ROWS = 1, 2  # keys that keep the generators of shard order and row order apart


def _ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


@dataclass(frozen=True)
class EpochPlan:
    """The order of one epoch.

    Attributes:
        shard_rows: Rows of each shard, in the Snapshot's order.
        lanes: C, the contiguous parts of the sequence that are read side by side.
        batch_size: B, rows of a global batch; divisible by C.
        window: Shards whose rows are permuted together.
        seed: Any integer; 0 is a seed like any other.
        shuffle: False keeps the Snapshot's order.
    """

    shard_rows: tuple[int, ...]
    lanes: int
    batch_size: int
    window: int = 4
    seed: int = 0
    epoch: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.lanes < 1 or self.batch_size < 1 or self.window < 1:
            raise ValueError(f"wanted lanes, batch_size and window of at least 1, seen {self}")
        if self.batch_size % self.lanes:
            raise ValueError(f"wanted a batch_size divisible by {self.lanes} lanes, seen {self.batch_size}")
        if any(rows < 0 for rows in self.shard_rows):
            raise ValueError("wanted shards of at least 0 rows")

    @cached_property
    def rows(self) -> int:
        """N, rows of the epoch."""
        return sum(self.shard_rows)

    @property
    def lane_batch(self) -> int:
        """b, the rows that a lane gives to a global batch."""
        return self.batch_size // self.lanes

    @cached_property
    def steps(self) -> int:
        """Global batches of the epoch: ceil(ceil(N / C) / b)."""
        return _ceil_div(_ceil_div(self.rows, self.lanes), self.lane_batch)

    @cached_property
    def shard_order(self) -> tuple[int, ...]:
        """The shards in the order in which the sequence takes them."""
        if not self.shuffle:
            return tuple(range(len(self.shard_rows)))
        order = self._generator(_SHARDS, 0).permutation(len(self.shard_rows))
        return tuple(int(shard) for shard in order)

    @cached_property
    def window_starts(self) -> Indices:
        """Where each window begins in the sequence, and N at the end. Shape (windows + 1,)."""
        rows = np.array([self.shard_rows[shard] for shard in self.shard_order], dtype=np.int64)
        ends = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        starts: Indices = np.append(ends[: len(rows) : self.window], self.rows)
        return starts

    @property
    def num_windows(self) -> int:
        """Windows of the epoch."""
        return len(self.window_starts) - 1

    def window_shards(self, window: int) -> tuple[int, ...]:
        """The shards of a window, in order."""
        return self.shard_order[window * self.window : (window + 1) * self.window]

    def window_len(self, window: int) -> int:
        """Rows of a window."""
        return int(self.window_starts[window + 1] - self.window_starts[window])

    def window_rows(self, window: int) -> Indices:
        """Row numbers inside a window, counted through its shards, in the order of the sequence."""
        rows = self.window_len(window)
        if not self.shuffle:
            return np.arange(rows, dtype=np.int64)
        return self._generator(_ROWS, window).permutation(rows).astype(np.int64, copy=False)

    def lane_range(self, lane: int) -> tuple[int, int]:
        """The part [start, end) of the sequence that a lane reads."""
        return lane * self.rows // self.lanes, (lane + 1) * self.rows // self.lanes

    def batch_bounds(self, lanes: Sequence[int], first: int, last: int) -> Indices:
        """Where global batches [first, last) begin in the lanes. Shape (last - first + 1, len(lanes)).

        Batch `first + i` takes positions [x[i, j], x[i + 1, j]) of the sequence from `lanes[j]`; none at its end.
        """
        starts, ends = np.array([self.lane_range(lane) for lane in lanes], dtype=np.int64).reshape(-1, 2).T
        taken = np.arange(first, last + 1, dtype=np.int64)[:, None] * self.lane_batch
        bounds: Indices = np.minimum(starts + taken, ends)
        return bounds

    def batch_rows(self, step: int) -> int:
        """Rows of global batch `step`: B, and what is left in the last."""
        return min(self.batch_size, self.rows - step * self.batch_size)

    def _generator(self, purpose: int, window: int) -> np.random.Generator:
        # A seed below 0 is as good as any: SeedSequence takes only natural numbers.
        return np.random.default_rng([self.seed % (1 << 64), self.epoch, purpose, window])


@dataclass(frozen=True)
class Piece:
    """A run of positions of the sequence that lie in one window.

    Attributes:
        start: First position inside the window.
        end: One past the last.
    """

    window: int
    start: int
    end: int


def pieces(plan: EpochPlan, start: int, end: int) -> list[Piece]:
    """The part [start, end) of the sequence, cut at the bounds of windows."""
    found = []
    starts = plan.window_starts
    window = int(np.searchsorted(starts, start, side="right")) - 1
    while start < end:
        upper = min(end, int(starts[window + 1]))
        if upper > start:
            offset = int(starts[window])
            found.append(Piece(window, start - offset, upper - offset))
            start = upper
        window += 1
    return found


def needed_steps(plan: EpochPlan, lanes: Sequence[int], start_step: int = 0) -> dict[int, tuple[int, int]]:
    """For each window that the lanes pass through from `start_step` on, the first and the last step that need it."""
    found: dict[int, tuple[int, int]] = {}
    for lane in lanes:
        lane_start, end = plan.lane_range(lane)
        start = int(plan.batch_bounds([lane], start_step, start_step)[0, 0])
        for piece in pieces(plan, start, end):
            offset = int(plan.window_starts[piece.window])
            first = (offset + piece.start - lane_start) // plan.lane_batch
            last = (offset + piece.end - 1 - lane_start) // plan.lane_batch
            known = found.get(piece.window, (first, last))
            found[piece.window] = (min(first, known[0]), max(last, known[1]))
    return found


def most_rows(plan: EpochPlan, needed: Mapping[int, tuple[int, int]]) -> int:
    """The most rows that the windows of one step have, where `needed` gives each window's first and last step."""
    rows = np.array([plan.window_len(window) for window in needed], dtype=np.int64)
    spans = np.array(list(needed.values()), dtype=np.int64).reshape(-1, 2)
    changes = np.concatenate([rows, -rows])
    at = np.concatenate([spans[:, 0], spans[:, 1] + 1])
    return int(np.cumsum(changes[np.lexsort((changes, at))]).max(initial=0))  # those that leave come first


def assign_lanes(lanes: int, ranks: int) -> list[range]:
    """Lanes of each rank: contiguous, and their numbers differ by at most one.

    Contiguous, because lanes side by side share windows, which a rank then reads once.
    """
    if ranks > lanes:
        raise ValueError(f"wanted at least as many lanes as ranks, seen {lanes} lanes and {ranks} ranks")
    return [range(rank * lanes // ranks, (rank + 1) * lanes // ranks) for rank in range(ranks)]
