"""IDX images and labels, gzip or not: the format of MNIST.

A file begins with a magic number (0x803 for images, 0x801 for labels) and big-endian sizes; uint8 data follows.
Format: http://yann.lecun.com/exdb/mnist/
"""

import gzip
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, cast

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.config.data import Table
from pipelines.errors import DataError

_IMAGES, _LABELS = 0x803, 0x801
_BATCH = 4096
_TASK_ROWS = 200_000


def read(spark: SparkSession, source: Table, files: Sequence[Path], root: Path) -> DataFrame:
    """Rows of `files`: an image's bytes and its label. No row is rejected: a file fits or it does not.

    Raises:
        DataError: A file is not IDX, is cut short, or has another number of labels than images.
    """
    image, label = source.columns
    tasks = [task for file in files for task in _tasks(file, root)]
    rows = spark.createDataFrame(tasks, "images string, labels string, file string, start bigint, num bigint")
    schema = f"`{image}` binary, `{label}` int, _file string, _line bigint"
    return (
        rows.repartitionByRange(len(tasks), "file", "start")
        .mapInArrow(partial(_read_tasks, names=[image, label]), schema)
        .withColumns({"_raw": F.lit(None).cast("string"), "_reason": F.lit(None).cast("string")})
    )


def _tasks(images: Path, root: Path) -> Iterator[tuple[str, str, str, int, int]]:
    """Ranges of records that one worker reads; a gzip file is one range, since it cannot be entered midway."""
    labels = images.with_name(images.name.replace("images-idx3", "labels-idx1"))
    if labels == images or not labels.is_file():
        raise DataError(
            f"{images}: wanted a file named ...images-idx3... with its ...labels-idx1... beside it, seen none"
        )
    num, height, width = _header(images, _IMAGES, 3)
    (num_labels,) = _header(labels, _LABELS, 1)
    if num != num_labels:
        raise DataError(f"{images}: {num} images, but {labels.name} holds {num_labels} labels")
    if not images.name.endswith(".gz") and images.stat().st_size != 16 + num * height * width:
        raise _truncated(images, 16 + num * height * width, images.stat().st_size)
    step = max(num, 1) if images.name.endswith(".gz") else _TASK_ROWS
    for start in range(0, max(num, 1), step):
        yield str(images), str(labels), os.path.relpath(images, root), start, min(step, num - start)


def _header(path: Path, magic: int, dims: int) -> tuple[int, ...]:
    with _open(path) as stream:
        head = _read_exactly(stream, 4 * (1 + dims), path)
    seen, *sizes = struct.unpack(f">{1 + dims}I", head)
    if seen != magic:
        raise DataError(f"{path}: wanted an IDX file with magic number {magic:#x}, seen {seen:#x}")
    return tuple(sizes)


def _open(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb"))


def _read_exactly(stream: IO[bytes], size: int, path: Path) -> bytes:
    try:
        data = stream.read(size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the gzip stream is damaged or cut short: {error}; fetch the file again") from None
    if len(data) != size:
        raise _truncated(path, size, len(data))
    return data


def _truncated(path: Path, wanted: int, seen: int) -> DataError:
    return DataError(f"{path}: the IDX file is cut short: wanted {wanted} bytes, seen {seen}; fetch the file again")


def _read_tasks(batches: Iterator[pa.RecordBatch], *, names: list[str]) -> Iterator[pa.RecordBatch]:
    """On a worker: the records of each range, in batches."""
    for batch in batches:
        for task in batch.to_pylist():
            for columns in _read_range(Path(task["images"]), Path(task["labels"]), task["start"], task["num"]):
                count = len(columns[0])
                files = pa.array([task["file"]] * count)
                yield pa.RecordBatch.from_arrays([*columns[:2], files, columns[2]], [*names, "_file", "_line"])


def _read_range(images: Path, labels: Path, start: int, num: int) -> Iterator[list[pa.Array]]:
    """Batches of (image bytes, label, record number from 1)."""
    size = 1
    for side in _header(images, _IMAGES, 3)[1:]:
        size *= side
    with _open(images) as image_stream, _open(labels) as label_stream:
        image_stream.seek(16 + start * size)
        label_stream.seek(8 + start)
        for begin in range(start, start + num, _BATCH):
            count = min(_BATCH, start + num - begin)
            pixels = _read_exactly(image_stream, count * size, images)
            values = _read_exactly(label_stream, count, labels)
            fixed = pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), count, [None, pa.py_buffer(pixels)])
            yield [
                fixed.cast(pa.binary()),
                pa.array(list(values), pa.int32()),
                pa.array(range(begin + 1, begin + count + 1), pa.int64()),
            ]
