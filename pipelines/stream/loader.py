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

import torch.distributed as dist

from pipelines.config.learning import default_lanes
from pipelines.errors import DataError
from pipelines.lake import Snapshot
from pipelines.lake.columns import columns_of
from pipelines.stream.epoch import Batch, EpochReader
from pipelines.stream.plan import EpochPlan, assign_lanes
from pipelines.stream.shards import shards_of
from pipelines.stream.times import LoaderTimes
from pipelines.stream.windows import Buffers


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
        self._epochs = epochs
        self._options: dict[str, Any] = {
            "prefetch_mb": prefetch_mb,
            "read_threads": read_threads,
            "pin": pin,
            "timeout_s": timeout_s,
        }
        self.epoch, self.step = 0, 0
        self.times = LoaderTimes()
        self._reader: EpochReader | None = None
        self._next_reader: EpochReader | None = None  # of the next epoch
        self._other_lanes: EpochReader | None = None  # of this epoch, from the step on at which lanes move
        self._buffers = Buffers(self.columns, self.plan(0).longest_window)  # the plan refuses what does not fit

    def __len__(self) -> int:
        return self.plan(self.epoch).steps

    def __iter__(self) -> Iterator[Batch]:
        """The batches of epoch `self.epoch` from `self.step` on; behind the last, the next epoch is up.

        A batch counts as taken, for `state_dict`, once it was handed out.
        """
        self._reader = self._take_reader()
        try:
            for batch in self._batches():
                self.step = batch.step + 1
                yield batch
                if self._next_reader is None and self._has_room() and self._is_wanted(self.epoch + 1):
                    self._next_reader = self._read(self.epoch + 1, 0)
            self.epoch, self.step = self.epoch + 1, 0
        finally:
            for reader in (self._reader, self._other_lanes):
                if reader is not None:
                    reader.close()
            self._reader = self._other_lanes = None

    def _batches(self) -> Iterator[Batch]:
        """The epoch's batches, from `self._reader` and, once lanes have moved, from the reader of the other lanes."""
        while self._reader is not None:
            for batch in self._reader:
                if self._other_lanes is not None and batch.step >= self._other_lanes.first:
                    break
                yield batch
            self._reader.close()
            self._reader, self._other_lanes = self._other_lanes, None

    def reassign(self, assignment: Sequence[range], *, at_step: int) -> None:
        """Move lanes: from `at_step` of this epoch on, rank i reads `assignment[i]`; called alike on all ranks.

        The rows of each global batch stay as they are. The rank's new lanes are read ahead from now on.
        """
        self.assignment = list(assignment)
        for reader in (self._next_reader, self._other_lanes):
            if reader is not None:
                reader.close()
        self._next_reader = None
        self._other_lanes = self._read(self.epoch, at_step) if at_step < len(self) else None

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
        for reader in (self._reader, self._next_reader, self._other_lanes):
            if reader is not None:
                reader.close()
        self._reader = self._next_reader = self._other_lanes = None

    def __enter__(self) -> "LaneLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _identity(self) -> dict[str, Any]:
        return {"snapshot": self.snapshot.digest, "lanes": self.lanes, **self._order}

    def _has_room(self) -> bool:
        return self._reader is not None and self._reader.leaves_room and self._other_lanes is None

    def _is_wanted(self, epoch: int) -> bool:
        return self._epochs is None or epoch < self._epochs

    def _take_reader(self) -> EpochReader:
        reader, self._next_reader = self._next_reader, None
        if reader is None:
            reader = self._read(self.epoch, self.step)
        elif (reader.plan.epoch, reader.first) != (self.epoch, self.step):
            reader.close()
            reader = self._read(self.epoch, self.step)
        return reader

    def _read(self, epoch: int, step: int) -> EpochReader:
        return EpochReader(
            self._shards,
            self.plan(epoch),
            self.columns,
            self.assignment[self.rank],
            self._buffers,
            start_step=step,
            times=self.times,
            **self._options,
        )


def _rank(rank: int | None) -> int:
    if rank is not None:
        return rank
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def _world_size(world_size: int | None) -> int:
    if world_size is not None:
        return world_size
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
