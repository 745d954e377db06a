"""Blocks of a text file's characters with their numbers, the same on every machine and core count.

A file is cut into ranges of bytes, and each block is read with the range in which it begins. A first pass counts the
characters of each range; a range's first block follows from the count before it.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

RANGE_BYTES = 16 << 20
_BATCH = 4096
_LONGEST = 4  # bytes of a character in UTF-8
Bytes: TypeAlias = npt.NDArray[np.uint8]
_RANGE = "path string, _file string, start bigint, size bigint"


def numbered_blocks(spark: SparkSession, files: Sequence[Path], root: Path, *, chars: int) -> DataFrame:
    """So many characters and the one behind them as `_raw`, with `_file` and `_line`, the block's number from 1.

    The character that two blocks share ends one and begins the next. The last block of a file may be shorter, of two
    characters or more; a file of a single one is a block as well. A byte that continues no character belongs to the one
    in front of it.
    """
    parts = _in_ranges(spark, _ranges(files, root), _RANGE)
    counts = parts.mapInArrow(_counted, f"{_RANGE}, num bigint").collect()
    blocks = _in_ranges(spark, _placed(counts), f"{_RANGE}, first bigint")
    cut = blocks.mapInArrow(partial(_cut, chars=chars), "bytes binary, _file string, _line bigint")
    return cut.select(F.col("bytes").cast("string").alias("_raw"), "_file", "_line")


def _ranges(files: Sequence[Path], root: Path) -> list[tuple[str, str, int, int]]:
    sizes = {file: file.stat().st_size for file in files}
    return [
        (str(file), os.path.relpath(file, root), start, min(RANGE_BYTES, size - start))
        for file, size in sizes.items()
        for start in range(0, size, RANGE_BYTES)
    ]


def _placed(counts: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Ranges with the characters of their file before them, by ranges with those in them."""
    found = []
    for _, group in groupby(sorted(counts), key=lambda part: str(part[0])):
        parts = list(group)
        before = accumulate((part[-1] for part in parts), initial=0)
        found += [(*part[:-1], first) for part, first in zip(parts, before, strict=False)]
    return found


def _in_ranges(spark: SparkSession, ranges: Sequence[tuple[Any, ...]], schema: str) -> DataFrame:
    """A range a task."""
    return spark.createDataFrame(ranges, schema).repartitionByRange(max(1, len(ranges)), "path", "start")


def _counted(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """On a worker: ranges with the characters that begin in them."""
    for batch in batches:
        nums = [len(_starts(_read(row["path"], row["start"], row["size"]), row["start"])) for row in batch.to_pylist()]
        yield pa.RecordBatch.from_arrays([*batch.columns, pa.array(nums, pa.int64())], [*batch.schema.names, "num"])


def _cut(batches: Iterable[pa.RecordBatch], *, chars: int) -> Iterator[pa.RecordBatch]:
    """On a worker: the blocks that begin in each range, in batches."""
    for batch in batches:
        for row in batch.to_pylist():
            data = _read(row["path"], row["start"], row["size"] + _LONGEST * (chars + 1))
            starts = _starts(data, row["start"])
            blocks = _blocks(data, starts, size=row["size"], first=row["first"], chars=chars)
            for place in range(0, len(blocks), _BATCH):
                some = blocks[place : place + _BATCH]
                columns = [
                    pa.array([block for _, block in some], pa.binary()),
                    pa.array([row["_file"]] * len(some)),
                    pa.array([number + 1 for number, _ in some], pa.int64()),
                ]
                yield pa.RecordBatch.from_arrays(columns, ["bytes", "_file", "_line"])


def _blocks(
    data: Bytes, starts: npt.NDArray[np.int64], *, size: int, first: int, chars: int
) -> list[tuple[int, bytes]]:
    """The number of each block that begins in a range, from 0, and its bytes.

    Args:
        data: The bytes of the range, and enough behind them for its last block.
        starts: Where characters begin in them.
        size: Of the range.
        first: Characters of the file before the range.
        chars: Of a block.
    """
    own, is_end = int(np.searchsorted(starts, size)), len(data) < size + _LONGEST * (chars + 1)
    bounds = np.append(starts, len(data))
    found = []
    for place in range(-first % chars, own, chars):
        number, end = (first + place) // chars, min(place + chars + 1, len(starts))
        if end - place > 1 or number == 0 or not is_end:  # else it is the end of the block before
            found.append((number, data[bounds[place] : bounds[end]].tobytes()))
    return found


def _starts(data: Bytes, start: int) -> npt.NDArray[np.int64]:
    """Where characters begin: at bytes that continue none (RFC 3629), and where the file does."""
    begins = (data & 0xC0) != 0x80
    begins[: start == 0] = True
    return np.flatnonzero(begins)


def _read(path: str, start: int, size: int) -> Bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return np.frombuffer(file.read(size), np.uint8)
