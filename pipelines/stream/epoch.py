"""EpochReader: a rank's part of an epoch as torch tensors, prepared ahead by threads.

Windows are read ahead (windows.py); one thread gathers batches from them, some steps at a time.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

from pipelines.errors import DataError
from pipelines.lake import Column
from pipelines.stream.forecast import Blocks
from pipelines.stream.plan import EpochPlan, Indices, needed_steps, pieces
from pipelines.stream.reader import Arrays, empty_arrays
from pipelines.stream.shards import Shard
from pipelines.stream.times import LoaderTimes
from pipelines.stream.windows import Buffers, Windows

CLOSE_TIMEOUT_S = 10.0
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


class EpochReader:
    """Iterates over a rank's batches of one epoch, from `start_step` on.

    Args:
        shards: Those that the plan orders.
        plan: Order of the epoch; `shard_rows` are those of `shards`.
        columns: Columns to read.
        lanes: The rank's lanes.
        buffers: Memory of the windows.
        start_step: The first global batch; any costs the same to start from.
        prefetch_mb: Memory for batches made ahead and for windows read ahead of their turn.
        read_threads: Threads that read shards side by side.
        pin: Page-locked tensors, for asynchronous copies to a GPU.
        timeout_s: The longest wait for a batch.
        times: Where the threads' time is noted.

    Raises:
        DataError: From the iterator, when a shard cannot be read as planned, or not in time.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        plan: EpochPlan,
        columns: Sequence[Column],
        lanes: Sequence[int],
        buffers: Buffers,
        *,
        start_step: int = 0,
        prefetch_mb: int = 64,
        read_threads: int = 2,
        pin: bool = False,
        timeout_s: float = 300.0,
        times: LoaderTimes | None = None,
    ) -> None:
        self.plan, self.first = plan, start_step
        self._columns, self._lanes = list(columns), list(lanes)
        self._pin, self._timeout_s = pin, timeout_s
        self._times = times or LoaderTimes()
        row_bytes = sum(column.bytes_per_row for column in columns)
        made = Blocks.of(plan, num_lanes=len(self._lanes), row_bytes=row_bytes, prefetch_mb=prefetch_mb)
        self._block_steps = made.steps
        self._blocks: queue.Queue[_Block | Exception | None] = queue.Queue(maxsize=made.queued)
        self._stop = threading.Event()
        self._budget = prefetch_mb * 1_000_000
        self._windows = Windows(
            shards,
            plan,
            self._columns,
            buffers,
            needed_steps(plan, lanes, start_step),
            ahead_bytes=self._budget // 2,
            threads=read_threads,
            times=self._times,
        )
        self._thread = threading.Thread(target=self._produce, name="lanes", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        step = self.first
        while (block := self._next_block(step)) is not _END:
            yield from block.batches(self.plan)
            step = block.first + len(block.sizes)

    def _next_block(self, step: int) -> "_Block | None":
        try:
            block = self._blocks.get(timeout=self._timeout_s)
        except queue.Empty:
            raise DataError(
                f"lanes {self._lanes[0]} to {self._lanes[-1]}, epoch {self.plan.epoch}, step {step}: wanted rows within "
                f"{self._timeout_s:g} s, still reading {self.reading()}; look at the disk, or raise train.timeout_s"
            ) from None
        if isinstance(block, Exception):
            raise block
        return block

    def reading(self) -> str:
        """The files that are being read; any thread may ask."""
        return self._windows.reading()

    @property
    def leaves_room(self) -> bool:
        """Whether every file is read, and so little of it is still held that another reader may begin."""
        return self._windows.all_read.is_set() and self._windows.held_bytes() <= self._budget

    def close(self) -> None:
        """Stop the threads; safe to call at any time. A read that hangs is left behind, in a daemon thread."""
        self._stop.set()
        limit = time.monotonic() + CLOSE_TIMEOUT_S
        while self._thread.is_alive() and time.monotonic() < limit:
            with contextlib.suppress(queue.Empty):
                self._blocks.get_nowait()  # room for what it is about to put
            self._thread.join(timeout=0.05)

    def _put(self, item: "_Block | Exception | None") -> None:
        while not self._stop.is_set():
            try:
                return self._blocks.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _produce(self) -> None:
        try:
            self._produce_blocks()
            self._put(_END)
        except Exception as error:
            self._put(error)
        finally:
            self._windows.close()

    def _produce_blocks(self) -> None:
        windows = self._windows
        for first in range(self.first, self.plan.steps, self._block_steps):
            if self._stop.is_set():
                return
            last = min(first + self._block_steps, self.plan.steps)
            windows.read_ahead(last)
            windows.wait_for(last)
            with self._times.measured("shuffle"):
                arrays, sizes = self._gather(first, last)
            with self._times.measured("collate"):
                block = self._collate(arrays, first, sizes)
            del arrays
            windows.drop_before(last)
            self._put(block)

    def _gather(self, first: int, last: int) -> tuple[Arrays, list[int]]:
        """The rank's rows of steps [first, last) in the order step, lane, row, and how many each step has."""
        windows = self._windows
        bounds = self.plan.batch_bounds(self._lanes, first, last)
        sizes = np.diff(bounds, axis=0)  # of shape (steps, lanes)
        found = [pieces(self.plan, *lane) for lane in bounds[[0, -1]].T.tolist()]
        needed = {piece.window for lane in found for piece in lane}
        if len(needed) == 1:  # all rows from one window: taken in their final order
            (only,) = needed
            order = windows[only].rows[_ranges(bounds[:-1], sizes) - self.plan.window_starts[only]]
            arrays = {k: v.take(order, axis=0, mode="clip") for k, v in windows[only].arrays.items()}
            return arrays, sizes.sum(axis=1).tolist()
        flat = empty_arrays(self._columns, int(sizes.sum()))  # lane behind lane: each is a few runs of the sequence
        at = 0
        for piece in (piece for lane in found for piece in lane):
            window, rows = windows[piece.window], windows[piece.window].rows[piece.start : piece.end]
            for name, values in window.arrays.items():
                values.take(rows, axis=0, out=flat[name][at : at + len(rows)], mode="clip")
            at += len(rows)
        if len(self._lanes) > 1:
            lane_starts = np.cumsum(bounds[-1] - bounds[0]) - (bounds[-1] - bounds[0])
            order = _ranges(bounds[:-1] - bounds[0] + lane_starts, sizes)
            flat = {name: values.take(order, axis=0, mode="clip") for name, values in flat.items()}
        return flat, sizes.sum(axis=1).tolist()

    def _collate(self, arrays: Arrays, first: int, sizes: list[int]) -> "_Block":
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self._pin:
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return _Block(first, sizes, {name: torch.split(tensor, sizes) for name, tensor in tensors.items()})


def _ranges(starts: Indices, sizes: Indices) -> Indices:
    """The numbers [start, start + size) of each range, one behind the other."""
    starts, sizes = starts.ravel(), sizes.ravel()
    skipped = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
    found: Indices = np.arange(len(skipped)) + skipped
    return found


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
