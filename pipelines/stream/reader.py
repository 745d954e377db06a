"""The only petastorm import: shards as numpy arrays, counted against the plan.

Petastorm is given an explicit list of files, in our order, for one epoch, without shuffling of its own and without
its thread pool, which loses the end of a list (docs/engines.md). Threads of ours drive its dummy pool instead.
`Reader` with a worker class of ours is not its public API, so petastorm is pinned and tests/stream holds it.
"""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.arrays import to_array
from pipelines.errors import DataError, one_line
from pipelines.lake import ROW_ID, Column
from pipelines.lake.row_ids import position_ids
from pipelines.stream.checksum import unchanged
from pipelines.stream.shards import Shard
from pipelines.stream.times import LoaderTimes

# Petastorm uses parts of pyarrow that warn at every read; one filter, since catch_warnings is not for threads.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"petastorm|pyarrow")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from petastorm.arrow_reader_worker import ArrowReaderWorker
    from petastorm.fs_utils import get_filesystem_and_path_or_paths
    from petastorm.reader import Reader
    from petastorm.workers_pool.dummy_pool import DummyPool
    from petastorm.workers_pool.ventilator import Ventilator

Arrays = dict[str, npt.NDArray[Any]]
_UNREADABLE = (OSError, pa.ArrowException, ValueError)


def empty_arrays(columns: Sequence[Column], rows: int) -> Arrays:
    """Arrays of shape (rows, *column.shape), to be filled."""
    return {column.name: np.empty((rows, *column.shape), dtype=column.dtype) for column in columns}


def read_shards(
    shards: Sequence[Shard],
    columns: Sequence[Column],
    *,
    into: Arrays | None = None,
    times: LoaderTimes | None = None,
) -> Arrays:
    """The rows of `shards`, one behind the other, as arrays of shape (rows, *column.shape).

    Each shard's rows are counted against the plan; when one comes short, all are read again, once.

    Args:
        shards: What to read, in this order.
        columns: What to read of them.
        into: Where the rows go, of that very shape; new arrays by default.
        times: Where the time is noted.

    Raises:
        DataError: A shard is short in two reads, cannot be read or does not fit the contract; it is named.
    """
    arrays = empty_arrays(columns, sum(shard.rows for shard in shards)) if into is None else into
    for attempt in (1, 2):
        try:
            _read_once(shards, columns, arrays, times or LoaderTimes())
            return arrays
        except _Misread as misread:
            if attempt == 2:
                raise DataError(
                    f"{misread.shard}: wanted {misread.wanted}, seen {misread.seen} in two reads; the file changed under "
                    "the table: restore it, or write the table again"
                ) from None
    raise AssertionError("unreachable")


class _Misread(Exception):
    """Petastorm did not give the shard that is next, or not all of it."""

    def __init__(self, shard: Shard, *, wanted: str, seen: str) -> None:
        super().__init__(f"{shard}: wanted {wanted}, seen {seen}")
        self.shard, self.wanted, self.seen = shard, wanted, seen


def _read_once(shards: Sequence[Shard], columns: Sequence[Column], arrays: Arrays, times: LoaderTimes) -> None:
    stored = [column for column in columns if column.name != ROW_ID or shards[0].first_position is None]
    reader, at, shard = None, 0, shards[0]
    try:
        reader = _ShardReader(shards, stored or columns, times)
        for shard in shards:
            part = next(reader, None)
            if part is None or reader.last_loaded != (str(shard.path), shard.row_group):
                raise _Misread(shard, wanted="it next", seen="the end" if part is None else str(reader.last_loaded))
            seen = len(part[0])
            if seen != shard.rows:
                raise _Misread(shard, wanted=f"{shard.rows:,} rows by the Snapshot", seen=f"{seen:,}")
            with times.measured("decode"):
                for column in stored:
                    arrays[column.name][at : at + seen] = getattr(part, column.name)
            if shard.first_position is not None and ROW_ID in arrays:
                arrays[ROW_ID][at : at + seen] = position_ids(shard.first_position, seen)
            at += seen
        if next(reader, None) is not None:
            raise _Misread(shard, wanted="the end behind it", seen=str(reader.last_loaded))
    except _UNREADABLE as error:
        if reader is None:
            shard = _without_footer(shards) or shard
        raise DataError(f"{shard}: cannot be read: {one_line(str(error), limit=200)}") from None
    finally:
        if reader is not None:
            reader.stop()
            reader.join()


def _without_footer(shards: Sequence[Shard]) -> Shard | None:
    """The first whose footer cannot be read: Petastorm reads all footers before the first row, and names no file."""
    for shard in shards:
        try:
            pq.read_metadata(shard.path)
        except _UNREADABLE:
            return shard
    return None


class _AllAtOnce(Ventilator):  # type: ignore[misc]
    """Gives the pool its work when it starts. Petastorm's own has a thread for it, which puts in three and sleeps."""

    def __init__(self, pool: DummyPool, pieces: Sequence[int]) -> None:
        super().__init__(pool.ventilate)
        self._pieces = pieces

    def start(self) -> None:
        for piece in self._pieces:
            self._ventilate_fn(piece_index=piece, worker_predicate=None, shuffle_row_drop_partition=(0, 1))

    def processed_item(self) -> None:
        pass

    def completed(self) -> bool:
        return True

    def stop(self) -> None:
        pass


class _ShardReader(Reader):  # type: ignore[misc]
    """Petastorm's Reader over an explicit list of row groups, in its order, for one epoch."""

    def __init__(self, shards: Sequence[Shard], columns: Sequence[Column], times: LoaderTimes) -> None:
        filesystem, _ = get_filesystem_and_path_or_paths("file:///")
        self._wanted = [(str(shard.path), shard.row_group) for shard in shards]
        self._loaded: list[tuple[str, int]] = []
        super().__init__(
            filesystem,
            list(dict.fromkeys(path for path, _ in self._wanted)),
            schema_fields=[f"^{re.escape(column.name)}$" for column in columns],
            worker_class=_worker_class(columns, self._loaded, times),
            reader_pool=DummyPool(),
            shuffle_row_groups=False,
            num_epochs=1,
            is_batched_reader=True,
        )

    @property
    def last_loaded(self) -> tuple[str, int] | None:
        """File and row group of the last result: the pool loads one when it is asked for one."""
        return self._loaded[-1] if self._loaded else None

    def _filter_row_groups(self, _dataset: Any, row_groups: Any, *_: Any) -> tuple[list[int], None]:
        places = {(piece.path, piece.row_group): place for place, piece in enumerate(row_groups)}
        return [places[wanted] for wanted in self._wanted if wanted in places], None

    def _create_ventilator(self, row_group_indexes: Sequence[int], *_: Any) -> Ventilator:
        return _AllAtOnce(self._workers_pool, row_group_indexes)


def _worker_class(
    columns: Sequence[Column], loaded: list[tuple[str, int]], times: LoaderTimes
) -> type[ArrowReaderWorker]:
    wanted = {column.name: column for column in columns}

    class ContractWorker(ArrowReaderWorker):  # type: ignore[misc]
        """Petastorm's worker, with columns as arrays of the contract's shapes: no list of rows is ever built."""

        def _load_rows(self, pq_file: Any, piece: Any, shuffle_row_drop_range: Any) -> Arrays:
            with times.measured("read"):
                table = super()._load_rows(pq_file, piece, shuffle_row_drop_range)
            loaded.append((piece.path, piece.row_group))
            with times.measured("decode"):
                return {name: to_array(table.column(name), column, where=piece.path) for name, column in wanted.items()}

        def _read_with_shuffle_row_drop(self, piece: Any, pq_file: Any, names: set[str], _: Any) -> pa.Table:
            # Petastorm's own opens the file again, and copies the table to put it in the order in which it is.
            with unchanged(Path(piece.path), pq_file.metadata, piece.row_group, sorted(names)):
                return pq_file.read_row_group(piece.row_group, columns=sorted(names), use_threads=False)

    return ContractWorker
