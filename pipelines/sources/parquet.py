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


def read(spark: SparkSession, source: Table, files: Sequence[Path], root: Path) -> DataFrame:
    """Rows of `files`. A row with NaN or infinity has a reason; a file with other columns fails the stage.

    Raises:
        DataError: A file is not Parquet, lacks a column, or has it in another type.
    """
    for file in files:
        _check_schema(file, source.columns)
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


def _check_schema(file: Path, columns: dict[str, str]) -> None:
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file}: wanted a Parquet file: {one_line(str(error), limit=160)}") from None
    for name, dtype in columns.items():
        if name not in schema.names:
            raise DataError(f"{file}: wanted a column {name!r}, seen {', '.join(schema.names)}")
        seen = schema.field(name).type
        if not _fits(seen, dtype):
            raise DataError(f"{file}: column {name!r}: wanted {dtype}, seen {seen}")


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
