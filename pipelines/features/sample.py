"""A bounded sample of a table, read without Spark: the first rows of some of its files, in the order they lie there.

In a table that was shuffled once any file is a random sample, so that what is strong shows in it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from pipelines.arrays import to_array
from pipelines.lake import Column, Snapshot
from pipelines.lake.columns import columns_of

MAX_FILES = 8
MAX_ROWS = 100_000
MAX_VALUES = 4_000_000  # over all columns


@dataclass(frozen=True)
class Sample:
    """Rows of a table.

    Attributes:
        columns: The label, and those that hold numbers: neither images nor sparse vectors.
        files: For each file its columns by name, each of shape (rows, *column.shape).
    """

    columns: tuple[Column, ...]
    files: tuple[dict[str, npt.NDArray[Any]], ...]

    def whole(self, name: str) -> npt.NDArray[Any]:
        """A column over all files."""
        return np.concatenate([file[name] for file in self.files])


def take_sample(snapshot: Snapshot) -> Sample:
    """At most `MAX_ROWS` rows and `MAX_VALUES` values of at most `MAX_FILES` files."""
    columns = tuple(column for column in columns_of(snapshot) if _is_number(column))
    paths = [path for path, file in zip(snapshot.paths(), snapshot.files, strict=True) if file.rows]
    chosen = [paths[i * len(paths) // MAX_FILES] for i in range(MAX_FILES)] if len(paths) > MAX_FILES else paths
    width = sum(column.width for column in columns)
    rows = max(2, min(MAX_ROWS, MAX_VALUES // max(1, width)) // max(1, len(chosen)))
    files = []
    for path in chosen if columns else []:
        with pq.ParquetFile(path) as file:
            batch = next(file.iter_batches(batch_size=rows, columns=[column.name for column in columns]))
        files.append({column.name: to_array(batch.column(column.name), column, where=str(path)) for column in columns})
    return Sample(columns=columns, files=tuple(files))


def places(column: Column) -> list[str]:
    """Names each place of a column's value."""
    if not column.shape:
        return [column.name]
    named = len(column.names) == column.width
    return list(column.names) if named else [f"{column.name} {place}" for place in range(column.width)]


def _is_number(column: Column) -> bool:
    return column.kind in ("label", "dense", "ids", "value") and not (column.shape and column.dtype == "uint8")
