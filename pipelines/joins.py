"""As-of joins: each row gains the latest row of another table before its own time, so that nothing of its future leaks.

Spark has no such join. Rows and history are shuffled together by their key and sorted by time, and each row takes the
last of the history that stands before it: n log n whatever a key's history is, and one row out for each row in.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from deltalake import DeltaTable
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from pipelines.config.data import Join, Source, Table
from pipelines.errors import DataError
from pipelines.session import size_shuffles
from pipelines.sources.files import raw_files, root_of

_DAY_S = 86_400


def join_as_of(rows: DataFrame, source: Source) -> DataFrame:
    """The source's `rows`, which have `_file` and `_line`, with the columns of its joins; nulls where nothing is old enough.

    Of several rows of one key and moment the last in its file counts, of several files the last by name.

    Raises:
        DataError: A row of a joined table does not fit its schema.
    """
    if source.joins:
        tables = [source, *[join.table for join in source.joins]]
        files = [file for table in tables for group in raw_files(table).values() for file in group]
        size_shuffles(rows.sparkSession, sum(file.stat().st_size for file in files))
    for join in source.joins:
        rows = _as_of(rows, _read(rows.sparkSession, join.table), join)
    return rows


def joined_tables(joins: Sequence[Join]) -> list[dict[str, Any]]:
    """What was joined, for the receipt: each table's files, or its version where it is a Delta table."""
    found: list[dict[str, Any]] = []
    for table in (join.table for join in joins):
        if table.format == "delta":
            paths = list(table.paths)
            versions = [table.options.get("version", DeltaTable(path).version()) for path in paths]
        else:
            paths = [str(path) for group in raw_files(table).values() for path in group]
            versions = []
        found.append({"paths": paths, "versions": versions})
    return found


def _read(spark: SparkSession, table: Table) -> DataFrame:
    files = [file for group in raw_files(table).values() for file in group]
    module = import_module(f"pipelines.sources.{table.format}")
    rows: DataFrame = module.read(spark, table, files, root_of(table))
    if unfit := rows.where(F.col("_reason").isNotNull()).select("_file", "_line", "_reason").head(1):
        raise DataError(
            f"source.joins: {unfit[0]['_file']} line {unfit[0]['_line']}: {unfit[0]['_reason']}; mend the row"
        )
    return rows


def _as_of(rows: DataFrame, history: DataFrame, join: Join) -> DataFrame:
    at, keys = F.col("_at"), [f"_key_{place}" for place in range(len(join.by))]
    known = F.lit(True)
    for left in join.by:
        known = known & F.col(left).isNotNull()
    left_rows = rows.select(
        F.struct(*rows.columns).alias("_row"),
        F.col(join.time.left).cast("timestamp").alias("_at"),
        *[F.col(left).alias(key) for left, key in zip(join.by, keys, strict=True)],
        F.lit(0 if join.strict else 1).alias("_side"),
        # Rows without a key find nothing; spread, so that they are not all one task's.
        F.when(known, F.lit(0)).otherwise(F.xxhash64("_file", "_line")).alias("_spread"),
    )
    right_rows = history.select(
        F.struct(
            F.col(join.time.right).cast("timestamp").alias("_at"),
            *[F.col(name).alias(join.named(name)) for name in join.table.columns if name not in join.by.values()],
        ).alias("_found"),
        F.col(join.time.right).cast("timestamp").alias("_at"),
        *[F.col(right).alias(key) for right, key in zip(join.by.values(), keys, strict=True)],
        F.lit(1 if join.strict else 0).alias("_side"),
        F.lit(0).cast("bigint").alias("_spread"),
        "_file",
        "_line",
    ).dropna(subset=["_at", *keys])
    if join.max_age_days:  # a long history in pieces of that length, so that a frequent key is many tasks' work
        left_rows = left_rows.withColumn("_piece", _piece(at, join.max_age_days))
        pieces = [_piece(at, join.max_age_days) + later for later in (0, 1)]
        right_rows = right_rows.withColumn("_piece", F.explode(F.array(*pieces)))
        keys.append("_piece")
    both = left_rows.unionByName(right_rows, allowMissingColumns=True)
    before = Window.partitionBy(*keys, "_spread").orderBy("_at", "_side", "_file", "_line")
    latest = F.last("_found", ignorenulls=True).over(before.rowsBetween(Window.unboundedPreceding, Window.currentRow))
    found = both.withColumn("_found", latest).where(F.col("_row").isNotNull())
    young = F.lit(True)
    if join.max_age_days:
        young = F.col("_found._at") >= at - F.make_dt_interval(F.lit(join.max_age_days))
    return found.select("_row.*", *[F.when(young, F.col(f"_found.{name}")).alias(name) for name in join.columns])


def _piece(at: Column, days: int) -> Column:
    return F.floor(F.unix_seconds(at) / (days * _DAY_S))
