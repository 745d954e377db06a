"""LaneLoader: a rank's rows of a Snapshot as torch tensors, an epoch an iteration, prepared ahead by threads.

    torchrun --nproc-per-node 2 train.py

    snapshot = Snapshot.open("lake/tables/adult/features/train", version=3)
    loader = LaneLoader(snapshot, batch_size=256, seed=7)      # rank and world size from torchrun
    for epoch in range(5):
        receipt = EpochReceipt(snapshot)
        for batch in loader:
            train_step(batch.tensors, batch.rows)
            receipt.add(batch)
        receipt.check(epoch=epoch)                             # every row once, over all ranks

`state_dict()` and `load_state_dict()` are those of torchdata's StatefulDataLoader; a state is the same on all ranks
and fits any number of them.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from pipelines.config.learning import default_lanes
from pipelines.errors import DataError
from pipelines.lake import Snapshot
from pipelines.lake.columns import columns_of
from pipelines.stream.batches import Batch, BatchReader, Transform, transformed
from pipelines.stream.forecast import Blocks, RowBytes
from pipelines.stream.plan import EpochPlan, assign_lanes
from pipelines.stream.shards import shards_of
from pipelines.stream.times import LoaderTimes
from pipelines.stream.windows import Windows


class LaneLoader:
    """Iterates over this rank's batches, one epoch an iteration, each row of the Snapshot in exactly one of them.

    The order depends on the Snapshot, `seed`, the epoch, `lanes`, `window` and `batch_size`, not on the number of
    ranks: global batch t is the same rows at any world size.

    Args:
        snapshot: The table at its version.
        batch_size: Rows of a global batch, over all ranks.
        columns: Names of the columns to read, `row_id` comes along; all by default.
        lanes: Row streams that the epoch is cut into; divides `batch_size`, at least the ranks. Default: the largest
            divisor of `batch_size` that is at most 16 and at least the ranks.
        window: Shards whose rows are permuted together.
        seed: Of the order; 0 is a seed like any other.
        shuffle: False keeps the table's order in each lane.
        rank: This rank. Default: torch.distributed's, else torchrun's variable RANK, else 0.
        world_size: Number of ranks, likewise.
        epochs: How many will be asked for; the next one is read ahead while one ends. None: no end.
        prefetch_mb: Memory for batches made ahead and windows read ahead of their turn.
        read_threads: Threads that read shards side by side.
        transform: Takes and gives tensors by column name, all but `row_id`; called from the reading thread with the
            rows of several batches at once, of which it must keep number and order, and treat each by itself; once,
            to learn its size, with a row of zeros.
        pin: Page-locked tensors, for asynchronous copies to a GPU.
        timeout_s: The longest wait for a batch.

    Raises:
        DataError: A column cannot become a tensor; from the iterator, a shard cannot be read as planned.
        ValueError: Lanes, batch size and ranks do not fit each other.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        batch_size: int,
        *,
        columns: Sequence[str] | None = None,
        lanes: int | None = None,
        window: int = 4,
        seed: int = 0,
        shuffle: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
        epochs: int | None = None,
        prefetch_mb: int = 64,
        read_threads: int = 2,
        transform: Transform | None = None,
        pin: bool = False,
        timeout_s: float = 300.0,
    ) -> None:
        self.snapshot = snapshot
        self.rank, self.world_size = _rank(rank), _world_size(world_size)
        self.columns = columns_of(snapshot, columns)
        self.lanes = lanes or default_lanes(batch_size, self.world_size)
        self._shards = shards_of(snapshot)
        self._order: dict[str, Any] = {"batch_size": batch_size, "window": window, "seed": seed, "shuffle": shuffle}
        self.assignment = assign_lanes(self.lanes, self.world_size)
        self._epochs, self._prefetch_mb, self._read_threads = epochs, prefetch_mb, read_threads
        self._transform, self._pin, self._timeout_s = transform, pin, timeout_s
        self.epoch, self.step = 0, 0
        self.times = LoaderTimes()
        self._reader: BatchReader | None = None
        self._other_lanes: BatchReader | None = None  # from the step on at which lanes move
        self.plan(0)  # refuses what does not fit

    def __len__(self) -> int:
        return self.plan(self.epoch).steps

    def __iter__(self) -> Iterator[Batch]:
        """The batches of epoch `self.epoch` from `self.step` on; behind the last, the next epoch is up.

        A batch counts as taken, for `state_dict`, once it was handed out.
        """
        plan, goes_on = self.plan(self.epoch), False
        try:
            for batch in self._batches(plan):
                self.step = batch.step + 1
                yield batch
            self.epoch, self.step = self.epoch + 1, 0
            goes_on = self._is_wanted(self.epoch)
        finally:
            if not goes_on:
                self.close()

    def _batches(self, plan: EpochPlan) -> Iterator[Batch]:
        """The epoch's batches, from one reader and, once lanes have moved, from that of the other lanes."""
        reader = self._reader_at(self.epoch, self.step)
        while True:
            for batch in reader.batches(plan):
                other = self._other_lanes
                if other is not None and (plan.epoch, batch.step) >= (other.epoch, other.step):
                    break
                yield batch
            if self._other_lanes is None:
                return
            reader.close()
            reader, self._other_lanes = self._other_lanes, None
            self._reader = reader

    def reassign(self, assignment: Sequence[range], *, at_step: int) -> None:
        """Move lanes: from `at_step` of this epoch on, rank i reads `assignment[i]`; called alike on all ranks.

        The rows of each global batch stay as they are. The rank's new lanes are read ahead from now on.
        """
        self.assignment = list(assignment)
        if self._other_lanes is not None:
            self._other_lanes.close()
        place = (self.epoch, at_step) if at_step < len(self) else (self.epoch + 1, 0)
        self._other_lanes = self._read(*place) if self._is_wanted(place[0]) else None

    def plan(self, epoch: int) -> EpochPlan:
        """The order of an epoch."""
        return EpochPlan(
            shard_rows=tuple(shard.rows for shard in self._shards), lanes=self.lanes, epoch=epoch, **self._order
        )

    @property
    def reading(self) -> str:
        """The files that are being read; any thread may ask."""
        reader = self._reader
        return reader.reading() if reader else "nothing"

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, as JSON; the same on all ranks, and good for any number of them."""
        at_end = self.step >= len(self)
        return {**self._identity(), "epoch": self.epoch + at_end, "step": 0 if at_end else self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; any step costs the same to go on from.

        Raises:
            DataError: It belongs to another snapshot, seed or order; the difference is named.
        """
        for name, wanted in self._identity().items():
            if state.get(name) != wanted:
                raise DataError(
                    f"loader state: {name}: wanted {wanted}, the state has {state.get(name)}; it belongs to another run"
                )
        self.close()
        self.epoch, self.step = int(state["epoch"]), int(state["step"])

    def close(self) -> None:
        """Stop the threads; safe to call at any time."""
        for reader in (self._reader, self._other_lanes):
            if reader is not None:
                reader.close()
        self._reader = self._other_lanes = None

    def __enter__(self) -> "LaneLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _identity(self) -> dict[str, Any]:
        return {"snapshot": self.snapshot.digest, "lanes": self.lanes, **self._order}

    def _is_wanted(self, epoch: int) -> bool:
        return self._epochs is None or epoch < self._epochs

    def _reader_at(self, epoch: int, step: int) -> BatchReader:
        """The reader that is there, if it is at that place."""
        if self._reader is None or (self._reader.epoch, self._reader.step) != (epoch, step):
            self.close()
            self._reader = self._read(epoch, step)
        return self._reader

    def _read(self, epoch: int, step: int) -> BatchReader:
        lanes = self.assignment[self.rank]
        windows = Windows(
            self._shards,
            self.plan,
            self.columns,
            lanes,
            epoch=epoch,
            step=step,
            end=None if self._epochs is None else max(self._epochs, epoch + 1),
            ahead_bytes=self._prefetch_mb * 500_000,  # the other half is for blocks
            threads=self._read_threads,
            times=self.times,
        )
        row = RowBytes(windows.row_bytes, made=self._made_row_bytes())
        return BatchReader(
            windows,
            self.columns,
            lanes,
            Blocks.of(self.plan(epoch), row, num_lanes=len(lanes), prefetch_mb=self._prefetch_mb),
            transform=self._transform,
            pin=self._pin,
            timeout_s=self._timeout_s,
            times=self.times,
        )

    def _made_row_bytes(self) -> int:
        """Of a row in a batch, found with one of zeros."""
        zeros = {c.name: torch.zeros((1, *c.shape), dtype=getattr(torch, c.dtype)) for c in self.columns}
        return sum(tensor.nbytes for tensor in transformed(zeros, self._transform).values())


def _rank(rank: int | None) -> int:
    if rank is not None:
        return rank
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def _world_size(world_size: int | None) -> int:
    if world_size is not None:
        return world_size
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
