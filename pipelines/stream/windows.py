"""Windows of a table in memory: read ahead by a few threads, each a part of a window with a Petastorm reader of its own.

A window is read once a rank and epoch, however many of the rank's lanes pass through it, and dropped when the last one
has. Its memory then serves another: taken anew for each window, it would fall to pieces that fit none.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from pipelines.lake import Column
from pipelines.stream.plan import EpochPlan, Indices, most_rows, needed_steps
from pipelines.stream.reader import Arrays, empty_arrays, read_shards
from pipelines.stream.shards import Shard
from pipelines.stream.times import LoaderTimes


class Window:
    """A window that is being read, in parts side by side.

    Attributes:
        buffer: Where it is read to; it may be longer than the window.
        arrays: Its rows in the order of the files, the first of the buffer; all there behind `wait`.
    """

    def __init__(self, buffer: Arrays, size: int, parts: Sequence[Future[Arrays]], rows: Future[Indices]) -> None:
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
    """The windows that a rank's lanes pass through, epoch after epoch, read ahead in the order in which they are needed.

    No more of them is held than one epoch needs at its worst step, and `ahead_bytes` or a single window more; what the
    next epoch begins with counts like any other.

    Args:
        shards: Those that the plans order.
        plan_of: The order of each epoch.
        columns: Columns to read.
        lanes: The rank's lanes.
        epoch: The first epoch.
        step: The first step of it.
        end: The epoch to end in front of; None: no end.
        ahead_bytes: Memory for windows that are read before their turn.
        threads: Threads that read.
        times: Where their time is noted.

    Attributes:
        epoch: Whose turn it is.
        step: Where the turn ends; before the first, where it begins.
        row_bytes: Of a row's columns.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        plan_of: Callable[[int], EpochPlan],
        columns: Sequence[Column],
        lanes: Sequence[int],
        *,
        epoch: int,
        step: int,
        end: int | None,
        ahead_bytes: int,
        threads: int,
        times: LoaderTimes,
    ) -> None:
        self.epoch, self.step = epoch, step
        self._shards, self._plan_of, self._columns, self._lanes = shards, plan_of, columns, lanes
        self._end, self._ahead_bytes, self._threads, self._times = end, ahead_bytes, threads, times
        self.row_bytes = sum(column.bytes_per_row for column in columns)
        self._plans: dict[int, EpochPlan] = {}  # of the epochs that windows are known of
        self._needed: dict[_Key, tuple[int, int]] = {}  # the first and the last step, counted through the epochs
        self._order: list[_Key] = []  # those that are not begun
        self._reading: dict[_Key, Window] = {}
        self._spare: list[Arrays] = []  # buffers of windows that were dropped
        self._most_bytes = 0  # of the windows that one step needs
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")

    def turns(self, num_steps: int) -> Iterator[tuple[EpochPlan, int, int]]:
        """The steps [first, last) of each epoch, some at a time, each once all windows that they need are read.

        Behind each turn the caller lets go of what no later one needs, by `drop`.
        """
        while self._is_wanted(self.epoch):
            if self.epoch not in self._plans:
                self._look_up(self.epoch)
            plan = self._plans[self.epoch]
            if not plan.steps:
                return
            for first in range(self.step, plan.steps, num_steps):
                last = min(first + num_steps, plan.steps)
                self._read_ahead(self._counted(self.epoch, last))
                self._wait_for(self._counted(self.epoch, last))
                self.step = last
                yield plan, first, last
            del self._plans[self.epoch]
            self.epoch, self.step = self.epoch + 1, 0

    def __getitem__(self, window: int) -> Window:
        """A window of the epoch whose turn it is."""
        return self._reading[self.epoch, window]

    def drop(self) -> None:
        """Let go of windows that no step behind this turn needs."""
        step = self._counted(self.epoch, self.step)
        for key in [key for key in self._reading if self._needed[key][1] < step]:
            self._spare.append(self._reading.pop(key).buffer)
            del self._needed[key]

    def close(self) -> None:
        """Begin nothing more. A read that hangs is left behind."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def reading(self) -> str:
        """The files that are being read; any thread may ask."""
        under_way = [key for key, window in list(self._reading.items()) if not window.is_read()]
        return ", ".join(str(shard) for key in under_way[:1] for shard in self._shards_of(key)) or "nothing"

    def _is_wanted(self, epoch: int) -> bool:
        return self._end is None or epoch < self._end

    def _counted(self, epoch: int, step: int) -> int:
        """The step's number through all epochs, which have equally many."""
        return epoch * self._plans[epoch].steps + step

    def _look_up(self, epoch: int) -> None:
        """Get to know the windows of an epoch."""
        plan = self._plans[epoch] = self._plan_of(epoch)
        needed = needed_steps(plan, self._lanes, self.step if epoch == self.epoch else 0)
        before = self._counted(epoch, 0)
        self._needed |= {(epoch, w): (first + before, last + before) for w, (first, last) in needed.items()}
        self._order = sorted(((epoch, w) for w in needed), key=lambda key: (self._needed[key][0], key))
        self._most_bytes = max(self._most_bytes, most_rows(plan, needed) * self.row_bytes)

    def _next(self) -> "_Key | None":
        """The window to begin next, of this epoch or of the one behind it."""
        if not self._order and len(self._plans) == 1 and self._is_wanted(self.epoch + 1):
            self._look_up(self.epoch + 1)
        return self._order[0] if self._order else None

    def _read_ahead(self, step: int) -> None:
        """Begin what steps before `step` need, and more as far as memory allows, at least one window."""
        while (key := self._next()) and self._needed[key][0] < step:
            self._begin()
        is_ahead = any(self._needed[key][0] >= step for key in self._reading)
        limit = self._most_bytes + self._ahead_bytes
        while (key := self._next()) and (
            not is_ahead or self._held_bytes() + self._rows_of(key) * self.row_bytes <= limit
        ):
            self._begin()
            is_ahead = True

    def _wait_for(self, step: int) -> None:
        """Wait until all that steps before `step` need is read."""
        for key, window in self._reading.items():
            if self._needed[key][0] < step:
                window.wait()

    def _begin(self) -> None:
        """Begin to read the next window, a part of its shards a thread."""
        key = self._order.pop(0)
        shards = self._shards_of(key)
        rows = self._pool.submit(self._permutation, key)
        buffer, at, parts = self._buffer(self._rows_of(key)), 0, []
        for chosen in np.array_split(np.arange(len(shards)), min(self._threads, len(shards))):
            part = shards[chosen[0] : chosen[-1] + 1]
            end = at + sum(shard.rows for shard in part)
            into = {name: array[at:end] for name, array in buffer.items()}
            parts.append(self._pool.submit(read_shards, part, self._columns, into=into, times=self._times))
            at = end
        self._reading[key] = Window(buffer, at, parts, rows)

    def _buffer(self, rows: int) -> Arrays:
        """A spare one of that length, at most twice it; else a new one, for which all spare ones go.

        So memory is bounded by twice the windows that are in use, however much their lengths differ.
        """
        for place, spare in enumerate(self._spare):
            if rows <= _length(spare) <= 2 * rows:
                return self._spare.pop(place)
        self._spare.clear()
        return empty_arrays(self._columns, rows)

    def _held_bytes(self) -> int:
        """Of the buffers in use."""
        return sum(_length(window.buffer) for window in self._reading.values()) * self.row_bytes

    def _permutation(self, key: "_Key") -> Indices:
        with self._times.measured("shuffle"):
            return self._plans[key[0]].window_rows(key[1])

    def _rows_of(self, key: "_Key") -> int:
        return self._plans[key[0]].window_len(key[1])

    def _shards_of(self, key: "_Key") -> list[Shard]:
        return [self._shards[shard] for shard in self._plans[key[0]].window_shards(key[1])]


_Key = tuple[int, int]  # epoch and window


def _length(buffer: Arrays) -> int:
    """Rows that a buffer holds."""
    return len(next(iter(buffer.values())))
