"""A Delta table, pinned at `options.version` or the latest."""

from collections.abc import Sequence
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession

from pipelines.config.data import Table
from pipelines.lake import Snapshot
from pipelines.sources import parquet


def read(spark: SparkSession, source: Table, files: Sequence[Path], root: Path) -> DataFrame:
    """Rows of the pinned version's files.

    Raises:
        LakeError: The table cannot be pinned (see `Snapshot.open`).
        DataError: A file lacks a declared column or has it in another type.
    """
    return parquet.read(spark, source, pinned_files(source, files), root)


def pinned_files(source: Table, tables: Sequence[Path]) -> list[Path]:
    """The Parquet files of each table at the pinned version."""
    version = source.options.get("version")
    pinned = [Snapshot.open(table, version=None if version is None else int(version), row_id_sum=0) for table in tables]
    return [path for snapshot in pinned for path in snapshot.paths()]
