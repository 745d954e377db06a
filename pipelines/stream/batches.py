"""BatchReader: a rank's batches as torch tensors, epoch after epoch, prepared ahead by threads.

Windows are read ahead (windows.py); one thread gathers batches from them, some steps at a time.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

from pipelines.errors import DataError
from pipelines.lake import ROW_ID, Column
from pipelines.stream.forecast import Blocks
from pipelines.stream.plan import EpochPlan, Indices, pieces
from pipelines.stream.reader import Arrays, empty_arrays
from pipelines.stream.times import LoaderTimes
from pipelines.stream.windows import Windows

CLOSE_TIMEOUT_S = 10.0
Transform = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Batch:
    """A rank's part of a global batch.

    Attributes:
        step: Number of the global batch in the epoch.
        tensors: Column name to tensor of shape (rows, ...). Where the rank has no rows in this step, one row of
            zeros, so that collectives stay aligned.
        rows: Rows of this rank, 0 where `tensors` is the row of zeros.
        global_rows: Rows of the global batch over all ranks.
        lane_rows: How many rows of `tensors` are of each of the rank's lanes, one behind the other. The rows of a lane
            are together at any number of ranks.
    """

    step: int
    tensors: dict[str, Tensor]
    rows: int
    global_rows: int
    lane_rows: tuple[int, ...]


class BatchReader:
    """Iterates over a rank's batches, epoch after epoch.

    Args:
        windows: What the rank's lanes pass through, from a step of an epoch on; the reader closes it.
        columns: Columns to read.
        lanes: The rank's lanes.
        blocks: How many batches are made at a time, and ahead.
        transform: What is done to the tensors of a block, all rows at once.
        pin: Page-locked tensors, for asynchronous copies to a GPU.
        timeout_s: The longest wait for a batch.
        times: Where the threads' time is noted.

    Attributes:
        epoch: Of the batch that comes next.
        step: Likewise, where a block of batches begins.

    Raises:
        DataError: From `batches`, when a shard cannot be read as planned, or not in time.
    """

    def __init__(
        self,
        windows: Windows,
        columns: Sequence[Column],
        lanes: Sequence[int],
        blocks: Blocks,
        *,
        transform: Transform | None,
        pin: bool,
        timeout_s: float,
        times: LoaderTimes,
    ) -> None:
        self.epoch, self.step = windows.epoch, windows.step
        self._windows, self._columns, self._lanes = windows, list(columns), list(lanes)
        self._block_steps, self._transform, self._pin = blocks.steps, transform, pin
        self._timeout_s, self._times = timeout_s, times
        self._blocks: queue.Queue[_Block | Exception] = queue.Queue(maxsize=blocks.queued)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="lanes", daemon=True)
        self._thread.start()

    def batches(self, plan: EpochPlan) -> Iterator[Batch]:
        """The batches that are left of epoch `self.epoch`, whose plan that is."""
        while self.epoch == plan.epoch and self.step < plan.steps:
            block = self._next_block()
            self.step = block.first + len(block.sizes)
            if self.step == plan.steps:
                self.epoch, self.step = self.epoch + 1, 0
            yield from block.batches(plan)

    def _next_block(self) -> "_Block":
        try:
            block = self._blocks.get(timeout=self._timeout_s)
        except queue.Empty:
            raise DataError(
                f"lanes {self._lanes[0]} to {self._lanes[-1]}, epoch {self.epoch}, step {self.step}: wanted rows within "
                f"{self._timeout_s:g} s, still reading {self.reading()}; look at the disk, or raise train.timeout_s"
            ) from None
        if isinstance(block, Exception):
            raise block
        return block

    def reading(self) -> str:
        """The files that are being read; any thread may ask."""
        return self._windows.reading()

    def close(self) -> None:
        """Stop the threads; safe to call at any time. A read that hangs is left behind, in a daemon thread."""
        self._stop.set()
        limit = time.monotonic() + CLOSE_TIMEOUT_S
        while self._thread.is_alive() and time.monotonic() < limit:
            with contextlib.suppress(queue.Empty):
                self._blocks.get_nowait()  # room for what it is about to put
            self._thread.join(timeout=0.05)

    def _put(self, item: "_Block | Exception") -> None:
        while not self._stop.is_set():
            try:
                return self._blocks.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _produce(self) -> None:
        try:
            for plan, first, last in self._windows.turns(self._block_steps):
                if self._stop.is_set():
                    return
                with self._times.measured("shuffle"):
                    arrays, sizes = self._gather(plan, first, last)
                with self._times.measured("collate"):
                    block = self._collate(arrays, first, sizes)
                del arrays
                self._windows.drop()  # the queue may have no room for long
                self._put(block)
        except Exception as error:
            self._put(error)
        finally:
            self._windows.close()

    def _gather(self, plan: EpochPlan, first: int, last: int) -> tuple[Arrays, list[list[int]]]:
        """The rank's rows of steps [first, last) in the order step, lane, row, and how many each step and lane has."""
        windows = self._windows
        bounds = plan.batch_bounds(self._lanes, first, last)
        sizes = np.diff(bounds, axis=0)  # of shape (steps, lanes)
        found = [pieces(plan, *lane) for lane in bounds[[0, -1]].T.tolist()]
        needed = {piece.window for lane in found for piece in lane}
        if len(needed) == 1:  # all rows from one window: taken in their final order
            (only,) = needed
            order = windows[only].rows[_ranges(bounds[:-1], sizes) - plan.window_starts[only]]
            arrays = {k: v.take(order, axis=0, mode="clip") for k, v in windows[only].arrays.items()}
            return arrays, sizes.tolist()
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
        return flat, sizes.tolist()

    def _collate(self, arrays: Arrays, first: int, sizes: list[list[int]]) -> "_Block":
        tensors = transformed({name: torch.from_numpy(array) for name, array in arrays.items()}, self._transform)
        if self._pin:
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        rows = list(map(sum, sizes))
        return _Block(first, sizes, {name: torch.split(tensor, rows) for name, tensor in tensors.items()})


def transformed(tensors: dict[str, Tensor], transform: Transform | None) -> dict[str, Tensor]:
    """What `transform` makes of all columns but `row_id`, which comes along as it is.

    Raises:
        DataError: Rows were lost or added.
    """
    if transform is None:
        return tensors
    row_ids = tensors[ROW_ID]
    made = transform({name: tensor for name, tensor in tensors.items() if name != ROW_ID})
    for name, tensor in made.items():
        if len(tensor) != len(row_ids):
            raise DataError(f"transform: {name!r}: wanted {len(row_ids):,} rows, as given, seen {len(tensor):,}")
    return {ROW_ID: row_ids} | {name: tensor for name, tensor in made.items() if name != ROW_ID}


def _ranges(starts: Indices, sizes: Indices) -> Indices:
    """The numbers [start, start + size) of each range, one behind the other."""
    starts, sizes = starts.ravel(), sizes.ravel()
    skipped = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
    found: Indices = np.arange(len(skipped)) + skipped
    return found


@dataclass(frozen=True)
class _Block:
    """The rank's batches of some steps, one behind the other; `sizes` are the rows of each step and lane."""

    first: int
    sizes: list[list[int]]
    parts: dict[str, tuple[Tensor, ...]]

    def batches(self, plan: EpochPlan) -> Iterator[Batch]:
        for step, sizes, *tensors in zip(count(self.first), self.sizes, *self.parts.values(), strict=False):
            rows, lane_rows = sum(sizes), tuple(sizes)
            if not rows:
                tensors, lane_rows = [tensor.new_zeros((1, *tensor.shape[1:])) for tensor in tensors], (1,)
            yield Batch(step, dict(zip(self.parts, tensors, strict=True)), rows, plan.batch_rows(step), lane_rows)
