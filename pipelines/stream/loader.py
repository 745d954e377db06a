"""LaneLoader: a rank's part of an epoch as torch tensors, prepared ahead by threads.

Windows are read by a few threads, each with a Petastorm reader of its own; one more thread gathers batches from
them. A window is read once a rank, however many of the rank's lanes pass through it, and dropped when the last
one has.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

from pipelines.errors import DataError
from pipelines.lake import Column, Snapshot
from pipelines.stream.plan import EpochPlan, Indices, pieces
from pipelines.stream.reader import Arrays, Shard, read_shards

READ_THREADS = 2
BLOCK_BYTES = 4 << 20  # batches are gathered some at a time, so that the cost of numpy calls spreads over them
_END = None


@dataclass(frozen=True)
class Batch:
    """A rank's part of a global batch.

    Attributes:
        step: Number of the global batch in the epoch.
        tensors: Column name to tensor of shape (rows, ...). Where the rank has no rows in this step, one row of
            zeros, so that collectives stay aligned.
        rows: Rows of this rank, 0 where `tensors` is the row of zeros.
        global_rows: Rows of the global batch over all ranks.
    """

    step: int
    tensors: dict[str, Tensor]
    rows: int
    global_rows: int


def shards_of(snapshot: Snapshot) -> list[Shard]:
    """The Snapshot's shards: one row group of one file each.

    Raises:
        DataError: A file holds several row groups.
    """
    for file in snapshot.files:
        if len(file.row_groups) > 1:
            raise DataError(
                f"{snapshot.table}/{file.path}: wanted one row group a file, seen {len(file.row_groups)}; write the table "
                "by the features stage"
            )
    found = [Shard(path, file.rows) for path, file in zip(snapshot.paths(), snapshot.files, strict=True)]
    return [shard for shard in found if shard.rows]


class LaneLoader:
    """Iterates over a rank's batches of one epoch, from `start_step` on.

    Args:
        snapshot: The table.
        plan: Order of the epoch; `shard_rows` are those of `shards_of(snapshot)`.
        columns: Columns to read.
        lanes: The rank's lanes.
        start_step: The first global batch; any costs the same to start from.
        prefetch_mb: Memory for batches made ahead and for windows read ahead of their turn.
        pin: Page-locked tensors, for asynchronous copies to a GPU.

    Raises:
        DataError: From the iterator, when a shard cannot be read as planned.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        plan: EpochPlan,
        columns: Sequence[Column],
        lanes: Sequence[int],
        *,
        start_step: int = 0,
        prefetch_mb: int = 64,
        pin: bool = False,
    ) -> None:
        self._shards = shards_of(snapshot)
        if tuple(shard.rows for shard in self._shards) != plan.shard_rows:
            raise ValueError("wanted a plan over the Snapshot's shards")
        self.plan, self._columns, self._lanes = plan, list(columns), list(lanes)
        self._first, self._pin = start_step, pin
        self._row_bytes = sum(column.bytes_per_row for column in columns)
        lane_bytes = max(1, plan.lane_batch * len(self._lanes) * self._row_bytes)
        self._block_steps = max(1, BLOCK_BYTES // lane_bytes)
        self._budget = prefetch_mb * 1_000_000
        ahead = max(1, self._budget // 2 // (self._block_steps * lane_bytes))
        self._blocks: queue.Queue[_Block | Exception | None] = queue.Queue(maxsize=min(ahead, 16))
        self._stop, self._all_read = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._produce, name="lanes", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        while (block := self._blocks.get()) is not _END:
            if isinstance(block, Exception):
                raise block
            yield from block.batches(self.plan)

    @property
    def all_read(self) -> bool:
        """Whether every file is read, so that another loader may begin."""
        return self._all_read.is_set()

    def close(self) -> None:
        """Stop the threads; safe to call at any time."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._blocks.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()

    def _put(self, item: "_Block | Exception | None") -> None:
        while not self._stop.is_set():
            try:
                return self._blocks.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _produce(self) -> None:
        with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read") as pool:
            try:
                self._produce_blocks(_Windows(self, pool))
                self._put(_END)
            except Exception as error:
                self._put(error)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _produce_blocks(self, windows: "_Windows") -> None:
        for first in range(self._first, self.plan.steps, self._block_steps):
            if self._stop.is_set():
                return
            last = min(first + self._block_steps, self.plan.steps)
            block = self._gather(windows, first, last)
            windows.drop_before(last)
            self._put(block)

    def _gather(self, windows: "_Windows", first: int, last: int) -> "_Block":
        """The batches of steps [first, last), in the order step, lane, row."""
        positions, sizes = self._positions(first, last)
        starts = self.plan.window_starts
        window_of = np.searchsorted(starts, positions, side="right") - 1
        needed = np.unique(window_of).tolist()
        if len(needed) == 1:  # all rows from one window: gather them in their final order
            order = windows.rows(needed[0])[positions - starts[needed[0]]]
            arrays = {k: v.take(order, axis=0, mode="clip") for k, v in windows.arrays(needed[0]).items()}
        else:
            arrays = {c.name: np.empty((len(positions), *c.shape), dtype=c.dtype) for c in self._columns}
            for window in needed:
                places = np.flatnonzero(window_of == window)
                chosen = windows.rows(window)[positions[places] - starts[window]]
                for name, values in windows.arrays(window).items():
                    arrays[name][places] = values.take(chosen, axis=0, mode="clip")
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self._pin:
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        parts = {name: torch.split(tensor, sizes) for name, tensor in tensors.items()}
        return _Block(first, sizes, parts)

    def _positions(self, first: int, last: int) -> tuple[Indices, list[int]]:
        """The rank's part of steps [first, last) as positions of the sequence, and how many each step takes."""
        bounds = self.plan.batch_bounds(self._lanes, first, last)
        sizes = np.diff(bounds, axis=0)  # of shape (steps, lanes)
        ends = np.cumsum(sizes)
        skipped = np.repeat(bounds[:-1].ravel() - (ends - sizes.ravel()), sizes.ravel())
        return np.arange(len(skipped)) + skipped, sizes.sum(axis=1).tolist()


@dataclass(frozen=True)
class _Block:
    """The rank's batches of some steps, one behind the other."""

    first: int
    sizes: list[int]
    parts: dict[str, tuple[Tensor, ...]]

    def batches(self, plan: EpochPlan) -> Iterator[Batch]:
        for step, rows, *tensors in zip(count(self.first), self.sizes, *self.parts.values(), strict=False):
            if not rows:
                tensors = [tensor.new_zeros((1, *tensor.shape[1:])) for tensor in tensors]
            yield Batch(step, dict(zip(self.parts, tensors, strict=True)), rows, plan.batch_rows(step))


class _Windows:
    """The windows that the rank's lanes pass through, read ahead in the order in which they are needed."""

    def __init__(self, loader: LaneLoader, pool: ThreadPoolExecutor) -> None:
        self._loader, self._pool = loader, pool
        self._needed = _needed_steps(loader.plan, loader._lanes, loader._first)
        self._order = sorted(self._needed, key=lambda window: (self._needed[window][0], window))
        self._reading: dict[int, Future[tuple[Arrays, Indices]]] = {}
        self._unread, self._lock = len(self._order), threading.Lock()
        if not self._order:
            loader._all_read.set()
        self._read_ahead()

    def arrays(self, window: int) -> Arrays:
        """The window's columns, rows in the order of its shards."""
        return self._get(window)[0]

    def rows(self, window: int) -> Indices:
        """The window's rows in the order of the sequence."""
        return self._get(window)[1]

    def drop_before(self, step: int) -> None:
        """Let go of windows that no step from `step` on needs, and read further ahead."""
        for window in [w for w in self._reading if self._needed[w][1] < step]:
            del self._reading[window]
        self._read_ahead()

    def _get(self, window: int) -> tuple[Arrays, Indices]:
        while window not in self._reading:
            self._start()
        return self._reading[window].result()

    def _read_ahead(self) -> None:
        """Start reads until the memory limit; at least one window beyond those in use."""
        budget = self._loader._budget // 2
        while self._order and (not self._reading or self._bytes() + self._size(self._order[0]) <= budget):
            self._start()

    def _start(self) -> None:
        window = self._order.pop(0)
        self._reading[window] = self._pool.submit(self._read, window)

    def _bytes(self) -> int:
        return sum(self._size(window) for window in self._reading)

    def _size(self, window: int) -> int:
        starts = self._loader.plan.window_starts
        return int(starts[window + 1] - starts[window]) * self._loader._row_bytes

    def _read(self, window: int) -> tuple[Arrays, Indices]:
        loader = self._loader
        shards = [loader._shards[shard] for shard in loader.plan.window_shards(window)]
        arrays = read_shards(shards, loader._columns)
        with self._lock:
            self._unread -= 1
            if not self._unread:
                loader._all_read.set()
        return arrays, loader.plan.window_rows(window)


def _needed_steps(plan: EpochPlan, lanes: Sequence[int], start_step: int) -> dict[int, tuple[int, int]]:
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
