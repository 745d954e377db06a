"""Windows of an epoch in memory: read ahead by a few threads, each a part of a window with a Petastorm reader of its own.

A window is read once a rank, however many of the rank's lanes pass through it, and dropped when the last one has. Its
memory then serves another: taken anew for each window, it would fall to pieces that fit none.
"""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from pipelines.lake import Column
from pipelines.stream.plan import EpochPlan, Indices
from pipelines.stream.reader import Arrays, empty_arrays, read_shards
from pipelines.stream.shards import Shard
from pipelines.stream.times import LoaderTimes


class Buffers:
    """Arrays for windows, each good for any window of a table, given back and taken again; for any thread.

    Args:
        columns: What is read.
        rows: The most that a window can have.
    """

    def __init__(self, columns: Sequence[Column], rows: int) -> None:
        self._columns, self._rows = columns, rows
        self._spare: deque[Arrays] = deque()

    def take(self) -> Arrays:
        """Arrays of `rows` rows, whatever is in them."""
        try:
            return self._spare.pop()
        except IndexError:
            return empty_arrays(self._columns, self._rows)

    def give_back(self, arrays: Arrays) -> None:
        """Nobody reads or writes them any more."""
        self._spare.append(arrays)


class Window:
    """A window that is being read, in parts side by side.

    Attributes:
        buffer: Where it is read to.
        arrays: Its rows in the order of the files, the first of the buffer; all there behind `wait`.
    """

    def __init__(self, buffer: Arrays, size: int, parts: Sequence[Future[None]], rows: Future[Indices]) -> None:
        self.buffer, self.arrays = buffer, {name: array[:size] for name, array in buffer.items()}
        self._parts, self._rows = parts, rows

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


class Windows:
    """The windows that a rank's lanes pass through, read ahead in the order in which they are needed.

    Args:
        shards: Those that the plan orders.
        plan: Order of the epoch.
        columns: Columns to read.
        buffers: Where their memory comes from.
        needed: For each window, the first and the last step that need it.
        ahead_bytes: Memory for windows that are read before their turn; one is, whatever its size.
        threads: Threads that read.
        times: Where their time is noted.

    Attributes:
        all_read: Set when there is nothing left to read.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        plan: EpochPlan,
        columns: Sequence[Column],
        buffers: Buffers,
        needed: Mapping[int, tuple[int, int]],
        *,
        ahead_bytes: int,
        threads: int,
        times: LoaderTimes,
    ) -> None:
        self._shards, self._plan, self._columns, self._buffers = shards, plan, columns, buffers
        self._needed, self._ahead_bytes, self._threads, self._times = needed, ahead_bytes, threads, times
        self._row_bytes = sum(column.bytes_per_row for column in columns)
        self._order = sorted(needed, key=lambda window: (needed[window][0], window))
        self._reading: dict[int, Window] = {}
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self._unread, self._lock = 0, threading.Lock()
        self.all_read = threading.Event()
        if not self._order:
            self.all_read.set()

    def __getitem__(self, window: int) -> Window:
        return self._reading[window]

    def close(self) -> None:
        """Begin nothing more. A read that hangs is left behind."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def held_bytes(self) -> int:
        """Bytes of the windows in memory."""
        return sum(self._size(window) for window in list(self._reading))

    def reading(self) -> str:
        """The files that are being read; any thread may ask."""
        under_way = [number for number, window in list(self._reading.items()) if not window.is_read()]
        return ", ".join(str(shard) for number in under_way[:1] for shard in self._shards_of(number)) or "nothing"

    def read_ahead(self, step: int) -> None:
        """Start what steps before `step` need, and more as far as the memory limit allows, at least one window."""
        while self._order and self._needed[self._order[0]][0] < step:
            self._start()
        ahead = sum(self._size(window) for window in self._reading if self._needed[window][0] >= step)
        while self._order and (not ahead or ahead + self._size(self._order[0]) <= self._ahead_bytes):
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
            self._buffers.give_back(self._reading.pop(window).buffer)

    def _start(self) -> None:
        """Begin to read the next window, a part of its shards a thread."""
        number = self._order.pop(0)
        shards = self._shards_of(number)
        rows = self._pool.submit(self._permutation, number)
        buffer, at, parts = self._buffers.take(), 0, []
        for chosen in np.array_split(np.arange(len(shards)), min(self._threads, len(shards))):
            part = shards[chosen[0] : chosen[-1] + 1]
            end = at + sum(shard.rows for shard in part)
            with self._lock:
                self._unread += 1
            parts.append(self._pool.submit(self._read, part, {name: array[at:end] for name, array in buffer.items()}))
            at = end
        self._reading[number] = Window(buffer, at, parts, rows)

    def _permutation(self, number: int) -> Indices:
        with self._times.measured("shuffle"):
            return self._plan.window_rows(number)

    def _read(self, shards: list[Shard], into: Arrays) -> None:
        read_shards(shards, self._columns, into=into, times=self._times)
        with self._lock:
            self._unread -= 1
            if not self._unread and not self._order:
                self.all_read.set()

    def _size(self, window: int) -> int:
        return self._plan.window_len(window) * self._row_bytes

    def _shards_of(self, window: int) -> list[Shard]:
        return [self._shards[shard] for shard in self._plan.window_shards(window)]
