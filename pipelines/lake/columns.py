"""The columns of a Snapshot as tensors: those of its contract, or, for any other table, what its files hold.

Read from the Parquet footers. A column that cannot become a tensor is a problem with a name, never left out in
silence and never turned into another type.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.errors import DataError, one_line
from pipelines.lake.contract import Column, Dtype
from pipelines.lake.row_ids import ROW_ID
from pipelines.lake.snapshot import Snapshot, rewrite_command


@dataclass(frozen=True)
class Problem:
    """Why a column cannot be streamed: what was wanted and what was seen."""

    column: str
    wanted: str
    seen: str

    def __str__(self) -> str:
        return f"column {self.column!r}: wanted {self.wanted}, seen {self.seen}"


def columns_of(snapshot: Snapshot, names: Sequence[str] | None = None) -> tuple[Column, ...]:
    """The named columns, all by default, with `row_id` in front.

    Raises:
        DataError: There is no such column, or one cannot become a tensor.
    """
    columns: dict[str, Column] = {}
    problems: list[Problem] = []
    if snapshot.contract is None:
        columns, problems = describe(snapshot)
    else:  # the features stage saw to it that the files hold just these
        columns = {column.name: column for column in snapshot.contract.columns}
    chosen = list(names) if names is not None else [*columns, *(p.column for p in problems)]
    for problem in problems:
        if problem.column in chosen:
            raise DataError(
                f"{snapshot.table} version {snapshot.version}: {problem}; choose other columns, or rewrite the table: "
                f"{rewrite_command(snapshot.table)}"
            )
    for name in chosen:
        if name not in columns:
            raise DataError(
                f"{snapshot.table} version {snapshot.version}: wanted a column {name!r}, seen {', '.join(columns)}"
            )
    return tuple(columns[name] for name in dict.fromkeys([ROW_ID, *chosen]))


def describe(snapshot: Snapshot) -> tuple[dict[str, Column], list[Problem]]:
    """Columns by name, `row_id` among them, and what stands in the way of the others."""
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(_open, snapshot.paths()))
    try:
        return _describe(snapshot, files)
    finally:
        for file in files:
            file.close()


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {one_line(str(error), limit=200)}") from None


def _describe(snapshot: Snapshot, files: list[pq.ParquetFile]) -> tuple[dict[str, Column], list[Problem]]:
    row_id = Column(name=ROW_ID, kind="row_id", dtype="int64")
    if not files:
        return {column.name: column for column in (snapshot.contract.columns if snapshot.contract else (row_id,))}, []
    known = {column.name: column for column in snapshot.contract.columns} if snapshot.contract else {}
    found: dict[str, Column] = {ROW_ID: row_id}
    problems = []
    for field in files[0].schema_arrow:
        seen = _differing(files, field) or _nulls(files, field.name)
        column = known.get(field.name) or (row_id if field.name == ROW_ID else None)
        if not seen and column is None:
            column, seen = _as_tensor(files, field)
        if seen:
            problems.append(Problem(field.name, *seen))
            found.pop(field.name, None)
        elif column is not None:
            found[field.name] = column
    first = set(files[0].schema_arrow.names)
    later = {name: file for file in files for name in file.schema_arrow.names if name not in first}
    problems += [Problem(name, "it in all files", "it in some of them only") for name in later]
    return found, problems


_Seen = tuple[str, str]  # what was wanted, what was seen


def _differing(files: list[pq.ParquetFile], field: pa.Field) -> _Seen | None:
    for file in files[1:]:
        place = file.schema_arrow.get_field_index(field.name)
        if place < 0:
            return "it in all files", "it in some of them only"
        if file.schema_arrow.field(place).type != field.type:
            return f"{field.type} in all files", str(file.schema_arrow.field(place).type)
    return None


def _nulls(files: list[pq.ParquetFile], name: str) -> _Seen | None:
    """Nulls by the footers' statistics; where there are none, a reader finds out."""
    nulls = sum(chunk.statistics.null_count or 0 for chunk in _chunks(files, name) if chunk.statistics is not None)
    return ("no nulls", f"{nulls:,}") if nulls else None


def _chunks(files: list[pq.ParquetFile], name: str) -> list[pq.ColumnChunkMetaData]:
    found = []
    for file in files:
        metadata = file.metadata
        leaves = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path.split(".")[0] == name]
        found += [metadata.row_group(g).column(i) for g in range(metadata.num_row_groups) for i in leaves]
    return found


def _as_tensor(files: list[pq.ParquetFile], field: pa.Field) -> tuple[Column | None, _Seen | None]:
    kind = field.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _list(files, field)
    if pa.types.is_binary(kind):
        return _bytes(files, field)
    if (dtype := _dtype(kind)) is not None:
        return Column(name=field.name, kind="value", dtype=dtype), None
    wanted = "a number, a boolean, a list of numbers or bytes of one length"
    return None, (wanted, str(kind))


def _dtype(kind: pa.DataType) -> Dtype | None:
    name = {"float": "float32", "double": "float64"}.get(str(kind), str(kind))
    return next((dtype for dtype in get_args(Dtype) if dtype == name), None)


def _list(files: list[pq.ParquetFile], field: pa.Field) -> tuple[Column | None, _Seen | None]:
    dtype = _dtype(field.type.value_type)
    if dtype is None or dtype in ("bool", "uint8"):
        return None, ("a list of numbers", str(field.type))
    widths = set()
    for file in files:
        for group, chunk in zip(range(file.metadata.num_row_groups), _chunks([file], field.name), strict=True):
            if rows := file.metadata.row_group(group).num_rows:
                widths.add(chunk.num_values / rows)
    return _fixed(field.name, dtype, widths)


def _bytes(files: list[pq.ParquetFile], field: pa.Field) -> tuple[Column | None, _Seen | None]:
    """Only the first rows are looked at; the reader looks at all."""
    first = next(files[0].iter_batches(batch_size=1024, row_groups=[0], columns=[field.name]), None)
    widths = set() if first is None else set(pc.unique(pc.binary_length(first.column(0).drop_null())).to_pylist())
    return _fixed(field.name, "uint8", widths)


def _fixed(name: str, dtype: Dtype, widths: set[float]) -> tuple[Column | None, _Seen | None]:
    width = next(iter(widths), 0)
    if len(widths) > 1 or width != int(width):
        return None, ("values of one length", "several lengths")
    return Column(name=name, kind="value", dtype=dtype, shape=(int(width),)), None
