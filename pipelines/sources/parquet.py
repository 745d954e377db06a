"""Parquet files with the declared columns."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.arrays import ARROW_TYPES
from pipelines.config.data import Table
from pipelines.errors import DataError, one_line
from pipelines.sources.lines import relative_path
from pipelines.sources.reasons import first_reason, not_finite
from pipelines.sources.schema import differences


def read(spark: SparkSession, source: Table, files: Sequence[Path], root: Path) -> DataFrame:
    """Rows of `files`. A row with NaN or infinity has a reason; a file with other columns fails the stage.

    Raises:
        DataError: A file is not Parquet, lacks a column, or has it in another type.
    """
    _check_schemas(files, source.columns)
    return (
        spark.read.parquet(*[str(file) for file in files])
        .select(
            *[F.col(name) for name in source.columns],
            relative_path(root).alias("_file"),
            (F.col("_metadata.row_index") + 1).alias("_line"),
        )
        .withColumn("_raw", F.to_json(F.struct(*[F.col(n) for n, t in source.columns.items() if t != "binary"])))
        .withColumn("_reason", first_reason(not_finite(source.columns)))
    )


def undeclared(files: Sequence[Path], columns: dict[str, str]) -> list[str]:
    """What a user should know of columns that are not declared, and so are left out."""
    found: dict[str, list[str]] = {}
    for file in files:
        for name in _schema(file).names:
            if name not in columns:
                found.setdefault(name, []).append(file.name)
    return [
        f"left out: column {name!r} of {'all' if len(holders) == len(files) else f'{len(holders):,} of {len(files):,}'} "
        f"files, as {holders[0]}; source.schema does not name it"
        for name, holders in found.items()
    ]


def _check_schemas(files: Sequence[Path], columns: dict[str, str]) -> None:
    """Refuse files without the declared columns; where files disagree, one of each kind is named."""
    misfits = {file: misfit for file in files if (misfit := _misfit(_schema(file), columns))}
    for file, misfit in misfits.items():
        right = next((f"; {other.name} has what is declared" for other in files if other not in misfits), "")
        more = f" (and {len(misfits) - 1} more files)" if len(misfits) > 1 else ""
        raise DataError(f"{file}{more}: {misfit}{right}; mend the file or source.schema")


def _misfit(schema: pa.Schema, columns: dict[str, str]) -> str:
    """What is wrong with a file's columns, or nothing."""
    for name, dtype in columns.items():
        if name not in schema.names:
            found = differences(dict.fromkeys(columns, ""), dict.fromkeys(schema.names, ""), in_order=False)
            return f"wanted a column {name!r}, seen {', '.join(schema.names)}: {', '.join(found)}"
        if not _fits(schema.field(name).type, dtype):
            return f"column {name!r}: wanted {dtype}, seen {schema.field(name).type}"
    return ""


def _schema(file: Path) -> pa.Schema:
    try:
        return pq.read_schema(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file}: wanted a Parquet file: {one_line(str(error), limit=160)}") from None


def _fits(seen: pa.DataType, dtype: str) -> bool:
    if dtype == "timestamp":
        return bool(pa.types.is_timestamp(seen))
    if dtype.startswith("array<"):
        element = ARROW_TYPES[dtype.removeprefix("array<").removesuffix(">")]
        return bool(pa.types.is_list(seen) and seen.value_type == element)
    if dtype.startswith("sparse("):
        return bool(
            pa.types.is_struct(seen) and {seen.field(i).name for i in range(seen.num_fields)} == {"ids", "values"}
        )
    return bool(seen == ARROW_TYPES[dtype])
