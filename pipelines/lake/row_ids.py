"""row_id, the number by which a row is accounted for: a column of the table, or a mix of the row's position in it."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import LakeError, one_line

ROW_ID = "row_id"
UINT64 = 1 << 64
_BLOCK_ROWS = 1 << 20


def position_ids(first: int, rows: int) -> npt.NDArray[np.int64]:
    """Ids of the rows at positions [first, first + rows) of a table without a column `row_id`. Shape (rows,).

    The finalizer of SplitMix64 (Steele, Lea, Flood 2014): one to one, so ids are as distinct as positions, and a
    sum of ids does not stay the same when neighbours take each other's place.
    """
    mixed = np.arange(first, first + rows, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))).view(np.int64)


def sum_position_ids(rows: int) -> int:
    """The sum of the ids of positions [0, rows) modulo 2^64."""
    blocks = (position_ids(first, min(_BLOCK_ROWS, rows - first)) for first in range(0, rows, _BLOCK_ROWS))
    return sum(_sum(block) for block in blocks) % UINT64


def sum_row_ids(files: Sequence[Path]) -> int:
    """The sum of the column `row_id` over Parquet files, modulo 2^64; raises as `read_row_ids`."""
    with ThreadPoolExecutor(4) as pool:
        return sum(pool.map(lambda path: _sum(read_row_ids(path)), files)) % UINT64


def read_row_ids(path: Path) -> npt.NDArray[np.int64]:
    """The column `row_id` of a Parquet file. Shape (rows,).

    Raises:
        LakeError: The file lacks the column, has nulls in it, or cannot be read.
    """
    try:
        column = pq.read_table(path, columns=[ROW_ID], partitioning=None).column(ROW_ID)
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise LakeError(f"{path}: wanted an int64 column {ROW_ID}: {one_line(str(error))}") from None
    if column.null_count:
        raise LakeError(f"{path}: wanted no nulls in the column {ROW_ID}, seen {column.null_count:,}")
    ids: npt.NDArray[np.int64] = column.to_numpy()
    return ids


def _sum(ids: npt.NDArray[np.int64]) -> int:
    return int(ids.view(np.uint64).sum(dtype=np.uint64))
