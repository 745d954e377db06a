"""Forecast: what an epoch will read, on which rank, in how much memory; a pure function of the plan."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.config.learning import Train
from pipelines.lake import Column, File, Snapshot
from pipelines.stream.plan import EpochPlan, assign_lanes, most_rows, needed_steps
from pipelines.stream.shards import Shard, shards_of

BLOCK_BYTES, QUEUED_BLOCKS = 8 << 20, 16


@dataclass(frozen=True)
class RowBytes:
    """Of a row's columns as they are read, and in a batch."""

    read: int
    made: int


@dataclass(frozen=True)
class Blocks:
    """How a rank's batches are made: some at a time, so that the cost of numpy calls spreads over them, and ahead.

    Attributes:
        steps: Batches of a block.
        bytes: Of a whole block.
        queued: Blocks that are made ahead.
    """

    steps: int
    bytes: int
    queued: int

    @classmethod
    def of(cls, plan: EpochPlan, row: RowBytes, *, num_lanes: int, prefetch_mb: int) -> "Blocks":
        """For a rank that reads `num_lanes` lanes; half of `prefetch_mb` is for blocks."""
        batch_rows = max(1, plan.lane_batch * num_lanes)
        steps = max(1, BLOCK_BYTES // (batch_rows * max(1, row.read)))
        block_bytes = steps * batch_rows * max(1, row.made)
        return cls(steps, block_bytes, queued=min(max(1, prefetch_mb * 500_000 // block_bytes), QUEUED_BLOCKS))


@dataclass(frozen=True)
class RankForecast:
    """What one rank reads in an epoch.

    Attributes:
        row_groups: Row groups that it opens; one on a boundary of ranks is opened by both.
        bytes: Of its rows as tensors.
        read_bytes: Of the row groups that it opens, as stored.
        held_bytes: The most that its loader holds at a time.
    """

    lanes: tuple[int, ...]
    files: int
    row_groups: int
    rows: int
    bytes: int
    read_bytes: int
    held_bytes: int


@dataclass(frozen=True)
class Forecast:
    """What an epoch will do.

    Attributes:
        imbalance: Rows of the rank with most over the mean of the ranks.
        largest_row_group: Bytes of the largest, as tensors.
    """

    rows: int
    steps: int
    lane_rows: tuple[int, int]
    ranks: tuple[RankForecast, ...]
    imbalance: float
    largest_row_group: int


def forecast(snapshot: Snapshot, columns: tuple[Column, ...], train: Train, *, seed: int) -> Forecast:
    """Of the first epoch; others differ in which row groups meet, not in how many."""
    shards = shards_of(snapshot)
    plan = EpochPlan(
        tuple(shard.rows for shard in shards), train.num_lanes, train.batch_size, train.window, seed=seed, epoch=0
    )
    row = RowBytes(sum(c.bytes_per_row for c in columns), made=sum(c.scaled_bytes_per_row for c in columns))
    stored = dict(zip(snapshot.paths(), snapshot.files, strict=True))
    ranks = tuple(
        _of_rank(plan, lanes, shards, stored, row, train) for lanes in assign_lanes(plan.lanes, train.data_ranks)
    )
    sizes = [end - start for start, end in map(plan.lane_range, range(plan.lanes))]
    return Forecast(
        rows=plan.rows,
        steps=plan.steps,
        lane_rows=(min(sizes), max(sizes)),
        ranks=ranks,
        imbalance=max(rank.rows for rank in ranks) * len(ranks) / max(plan.rows, 1),
        largest_row_group=max((shard.rows for shard in shards), default=0) * row.read,
    )


def _of_rank(
    plan: EpochPlan, lanes: range, shards: list[Shard], stored: dict[Path, File], row: RowBytes, train: Train
) -> RankForecast:
    needed = needed_steps(plan, lanes)
    touched = [shards[shard] for window in needed for shard in plan.window_shards(window)]
    rows = plan.lane_range(lanes[-1])[1] - plan.lane_range(lanes[0])[0]
    return RankForecast(
        lanes=tuple(lanes),
        files=len({shard.path for shard in touched}),
        row_groups=len(touched),
        rows=rows,
        bytes=rows * row.read,
        read_bytes=sum(_stored_bytes(stored[shard.path], shard) for shard in touched),
        held_bytes=_held_bytes(plan, needed, row, len(lanes), train),
    )


def _stored_bytes(file: File, shard: Shard) -> int:
    """A row group's part of its file."""
    sizes = [size for _, size in file.row_groups]
    return file.bytes * sizes[shard.row_group] // max(sum(sizes), 1)


def _held_bytes(
    plan: EpochPlan, needed: dict[int, tuple[int, int]], row: RowBytes, num_lanes: int, train: Train
) -> int:
    """Windows in use and ahead, what is being decoded, and batches made ahead, at the worst step."""
    sizes = [plan.window_len(window) * row.read for window in needed]
    ahead = max(train.prefetch_mb * 500_000, max(sizes, default=0))
    windows = min(most_rows(plan, needed) * row.read + ahead, 2 * sum(sizes))  # of this epoch and of the next
    decoding = 2 * max(plan.shard_rows, default=0) * row.read * train.read_threads  # as Arrow's, and as stored
    blocks = Blocks.of(plan, row, num_lanes=num_lanes, prefetch_mb=train.prefetch_mb)
    made = (blocks.queued + 2) * blocks.bytes  # one is made, one is taken
    return windows + decoding + min(made, 2 * sum(sizes) * row.made // max(1, row.read))
