"""A Delta table, read as the Parquet files of its pinned version (see `raw_files`)."""

from pipelines.sources.parquet import read

__all__ = ["read"]
