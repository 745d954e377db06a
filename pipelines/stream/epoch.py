"""EpochReader: a rank's part of an epoch as torch tensors, prepared ahead by threads.

Windows are read by a few threads, each a part of a window with a Petastorm reader of its own; one more thread gathers
batches from them. A window is read once a rank, however many of the rank's lanes pass through it, and dropped when the last
one has.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

from pipelines.errors import DataError
from pipelines.lake import Column
from pipelines.stream.forecast import Blocks
from pipelines.stream.plan import EpochPlan, Indices, needed_steps, pieces
from pipelines.stream.reader import Arrays, empty_arrays, read_shards
from pipelines.stream.shards import Shard
from pipelines.stream.times import LoaderTimes

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
        *,
        start_step: int = 0,
        prefetch_mb: int = 64,
        read_threads: int = 2,
        pin: bool = False,
        timeout_s: float = 300.0,
        times: LoaderTimes | None = None,
    ) -> None:
        self.plan, self.first = plan, start_step
        self._shards, self._columns, self._lanes = shards, list(columns), list(lanes)
        self._read_threads, self._pin, self._timeout_s = read_threads, pin, timeout_s
        self._times = times or LoaderTimes()
        self._row_bytes = sum(column.bytes_per_row for column in columns)
        self._budget = prefetch_mb * 1_000_000
        made = Blocks.of(plan, num_lanes=len(self._lanes), row_bytes=self._row_bytes, prefetch_mb=prefetch_mb)
        self._block_steps = made.steps
        self._blocks: queue.Queue[_Block | Exception | None] = queue.Queue(maxsize=made.queued)
        self._stop, self._all_read = threading.Event(), threading.Event()
        self._windows: _Windows | None = None
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
        windows = self._windows
        return windows.reading() if windows else "nothing yet"

    @property
    def leaves_room(self) -> bool:
        """Whether every file is read, and so little of it is still held that another reader may begin."""
        return self._all_read.is_set() and (self._windows is None or self._windows.held_bytes() <= self._budget)

    def close(self) -> None:
        """Stop the threads; safe to call at any time. A read that hangs is left behind, in a daemon thread."""
        self._stop.set()
        limit = time.monotonic() + CLOSE_TIMEOUT_S
        while self._thread.is_alive() and time.monotonic() < limit:
            with contextlib.suppress(queue.Empty):
                self._blocks.get(timeout=0.05)

    def _put(self, item: "_Block | Exception | None") -> None:
        while not self._stop.is_set():
            try:
                return self._blocks.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _produce(self) -> None:
        with ThreadPoolExecutor(self._read_threads, thread_name_prefix="read") as pool:
            try:
                self._windows = _Windows(self, pool)
                self._produce_blocks(self._windows)
                self._put(_END)
            except Exception as error:
                self._put(error)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _produce_blocks(self, windows: "_Windows") -> None:
        for first in range(self.first, self.plan.steps, self._block_steps):
            if self._stop.is_set():
                return
            last = min(first + self._block_steps, self.plan.steps)
            windows.read_ahead(last)
            windows.wait_for(last)
            with self._times.measured("shuffle"):
                arrays, sizes = self._gather(windows, first, last)
            with self._times.measured("collate"):
                block = self._collate(arrays, first, sizes)
            del arrays
            windows.drop_before(last)
            self._put(block)

    def _gather(self, windows: "_Windows", first: int, last: int) -> tuple[Arrays, list[int]]:
        """The rank's rows of steps [first, last) in the order step, lane, row, and how many each step has."""
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


class _Window:
    """A window that is being read, in parts side by side."""

    def __init__(self, arrays: Arrays, parts: Sequence[Future[None]], rows: Future[Indices]) -> None:
        self.arrays, self._parts, self._rows = arrays, parts, rows

    @property
    def rows(self) -> Indices:
        """Row numbers inside the window, in the order of the sequence."""
        return self._rows.result()

    def wait(self) -> None:
        """Until it is read; raises what a reader raised."""
        for part in self._parts:
            part.result()

    def is_read(self) -> bool:
        """Whether `wait` would come back at once."""
        return all(part.done() for part in self._parts)


class _Windows:
    """The windows that the rank's lanes pass through, read ahead in the order in which they are needed."""

    def __init__(self, reader: EpochReader, pool: ThreadPoolExecutor) -> None:
        self._reader, self._pool = reader, pool
        self._needed = needed_steps(reader.plan, reader._lanes, reader.first)
        self._order = sorted(self._needed, key=lambda window: (self._needed[window][0], window))
        self._reading: dict[int, _Window] = {}
        self._unread, self._lock = 0, threading.Lock()
        if not self._order:
            reader._all_read.set()

    def __getitem__(self, window: int) -> _Window:
        return self._reading[window]

    def held_bytes(self) -> int:
        """Bytes of the windows in memory."""
        return sum(self._size(window) for window in list(self._reading))

    def reading(self) -> str:
        """The files that are being read."""
        under_way = [number for number, window in list(self._reading.items()) if not window.is_read()]
        return ", ".join(str(shard) for number in under_way[:1] for shard in self._shards(number)) or "nothing"

    def read_ahead(self, step: int) -> None:
        """Start what steps before `step` need, and more as far as the memory limit allows, at least one window."""
        while self._order and self._needed[self._order[0]][0] < step:
            self._start()
        ahead = sum(self._size(window) for window in self._reading if self._needed[window][0] >= step)
        while self._order and (not ahead or ahead + self._size(self._order[0]) <= self._reader._budget // 2):
            ahead += self._size(self._order[0])
            self._start()

    def wait_for(self, step: int) -> None:
        """Wait until all that steps before `step` need is read."""
        for number, window in self._reading.items():
            if self._needed[number][0] < step:
                window.wait()

    def drop_before(self, step: int) -> None:
        """Let go of windows that no step from `step` on needs."""
        for window in [w for w in self._reading if self._needed[w][1] < step]:
            del self._reading[window]

    def _start(self) -> None:
        """Begin to read the next window, a part of its shards a thread."""
        reader, number = self._reader, self._order.pop(0)
        shards = self._shards(number)
        rows = self._pool.submit(self._permutation, number)
        arrays, at, parts = empty_arrays(reader._columns, sum(shard.rows for shard in shards)), 0, []
        for chosen in np.array_split(np.arange(len(shards)), min(reader._read_threads, len(shards))):
            part = shards[chosen[0] : chosen[-1] + 1]
            end = at + sum(shard.rows for shard in part)
            with self._lock:
                self._unread += 1
            parts.append(self._pool.submit(self._read, part, {name: array[at:end] for name, array in arrays.items()}))
            at = end
        self._reading[number] = _Window(arrays, parts, rows)

    def _permutation(self, number: int) -> Indices:
        with self._reader._times.measured("shuffle"):
            return self._reader.plan.window_rows(number)

    def _read(self, shards: list[Shard], into: Arrays) -> None:
        read_shards(shards, self._reader._columns, into=into, times=self._reader._times)
        with self._lock:
            self._unread -= 1
            if not self._unread and not self._order:
                self._reader._all_read.set()

    def _size(self, window: int) -> int:
        return self._reader.plan.window_len(window) * self._reader._row_bytes

    def _shards(self, window: int) -> list[Shard]:
        return [self._reader._shards[shard] for shard in self._reader.plan.window_shards(window)]
