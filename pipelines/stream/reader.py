"""The only petastorm import: shards as numpy arrays, counted against the plan.

Petastorm is given an explicit list of files, in our order, for one epoch, without shuffling of its own and without
its thread pool, which loses the end of a list (docs/engines.md). Threads of ours drive its dummy pool instead.
`Reader` with a worker class of ours is not its public API, so petastorm is pinned and tests/stream holds it.
"""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.arrays import to_array
from pipelines.errors import DataError, one_line
from pipelines.lake import Column

# Petastorm uses parts of pyarrow that warn at every read; one filter, since catch_warnings is not for threads.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"petastorm|pyarrow")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from petastorm.arrow_reader_worker import ArrowReaderWorker
    from petastorm.fs_utils import get_filesystem_and_path_or_paths
    from petastorm.reader import Reader
    from petastorm.workers_pool.dummy_pool import DummyPool

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Shard:
    """A file of one row group, and the rows that the Snapshot says it holds."""

    path: Path
    rows: int


def read_shards(shards: Sequence[Shard], columns: Sequence[Column]) -> Arrays:
    """The rows of `shards`, one behind the other, as arrays of shape (rows, *column.shape).

    Each shard's rows are counted against the plan; when one comes short, all are read again, once.

    Raises:
        DataError: A shard is short in two reads, cannot be read or does not fit the contract; it is named.
    """
    for attempt in (1, 2):
        try:
            return _read_once(shards, columns)
        except _ShortRead as short:
            if attempt == 2:
                raise DataError(
                    f"{short.shard.path}: wanted {short.shard.rows:,} rows by the Snapshot, seen {short.seen:,} in two "
                    "reads; the file changed under the table: run features again"
                ) from None
    raise AssertionError("unreachable")


class _ShortRead(Exception):
    def __init__(self, shard: Shard, seen: int) -> None:
        super().__init__(f"{shard.path}: {seen} of {shard.rows} rows")
        self.shard, self.seen = shard, seen


def _read_once(shards: Sequence[Shard], columns: Sequence[Column]) -> Arrays:
    total = sum(shard.rows for shard in shards)
    arrays: Arrays = {c.name: np.empty((total, *c.shape), dtype=c.dtype) for c in columns}
    reader, at, shard = None, 0, shards[0]
    try:
        reader = _open(shards, columns)
        for shard in shards:
            part = next(reader, None)
            seen = 0 if part is None else len(part[0])
            if seen != shard.rows:
                raise _ShortRead(shard, seen)
            for column in columns:
                arrays[column.name][at : at + seen] = getattr(part, column.name)
            at += seen
        if _is_drained(reader) and next(reader, None) is not None:
            raise DataError(f"{shards[-1].path}: wanted the end of the list, seen more rows; run features again")
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataError(f"{shard.path}: cannot be read: {one_line(str(error), limit=200)}") from None
    finally:
        if reader is not None:
            reader.stop()
            reader.join()
    return arrays


def _is_drained(reader: Reader) -> bool:
    """Whether Petastorm's ventilator has put out its last item; asked before, its dummy pool would wait for ever."""
    for _ in range(1000):
        if reader.ventilator.completed():
            return True
        time.sleep(0.001)
    return False


def _open(shards: Sequence[Shard], columns: Sequence[Column]) -> Reader:
    filesystem, _ = get_filesystem_and_path_or_paths("file:///")
    reader = Reader(
        filesystem,
        [str(shard.path) for shard in shards],
        schema_fields=[f"^{column.name}$" for column in columns],
        worker_class=_worker_class(columns),
        reader_pool=DummyPool(),
        shuffle_row_groups=False,
        num_epochs=1,
        is_batched_reader=True,
    )
    time.sleep(0.001)  # the dummy pool sleeps for 0.1 s when it is asked before its queue is filled
    return reader


def _worker_class(columns: Sequence[Column]) -> type[ArrowReaderWorker]:
    wanted = {column.name: column for column in columns}

    class ContractWorker(ArrowReaderWorker):  # type: ignore[misc]
        """Petastorm's worker, with columns as arrays of the contract's shapes: no list of rows is ever built."""

        def _load_rows(self, pq_file: Any, piece: Any, shuffle_row_drop_range: Any) -> Arrays:
            table = super()._load_rows(pq_file, piece, shuffle_row_drop_range)
            return {name: to_array(table.column(name), column, where=piece.path) for name, column in wanted.items()}

        def _read_with_shuffle_row_drop(self, piece: Any, pq_file: Any, names: set[str], _: Any) -> pa.Table:
            # Petastorm's own opens the file again, and copies the table to put it in the order in which it is.
            return pq_file.read_row_group(piece.row_group, columns=sorted(names), use_threads=False)

    return ContractWorker
