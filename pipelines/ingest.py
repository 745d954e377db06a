"""Ingest: map raw files to a typed Delta table; rows that do not fit go to `<table>_rejects`.

accepted + rejected = read, always. The rows are written in one pass over the raw files; only where some were
rejected does a second pass write those.
"""

import shutil
from functools import reduce
from importlib import import_module
from pathlib import Path

from pyspark.sql import DataFrame, Observation, SparkSession
from pyspark.sql import functions as F

from pipelines.config.data import Source
from pipelines.errors import DataError
from pipelines.joins import join_as_of, joined_tables
from pipelines.lake import table_path
from pipelines.session import get_session
from pipelines.sources.files import raw_files, root_of
from pipelines.stage import Given, Made
from pipelines.tables import current_version, write_table

POSITION = ("_file", "_line")


def build(given: Given) -> Made:
    """Read the raw files into the workload's `raw` table.

    Raises:
        DataError: No rows, or more rejected than `source.max_rejected` allows; the rejects are written first.
    """
    config = given.config
    spark = get_session(config)
    table, rejects = table_path(config.workload, "raw"), table_path(config.workload, "raw_rejects")
    before = current_version(table)
    seen = Observation()
    parsed = parse(spark, config.source)
    rows = parsed.observe(
        seen, F.count(F.lit(1)).alias("read"), F.count_if(F.col("_reason").isNotNull()).alias("rejected")
    )
    accepted = join_as_of(rows.where(F.col("_reason").isNull()).drop("_raw", "_reason"), config.source)
    snapshot = write_table(accepted, table, what="ingest")
    read, rejected = seen.get["read"], seen.get["rejected"]
    if snapshot.rows + rejected != read:
        raise DataError(f"ingest: accepted {snapshot.rows} + rejected {rejected} rows, but {read} were read")
    reasons = _write_rejects(parsed, rejects, rejected)
    counts = {"rows_read": read, "rows_accepted": snapshot.rows, "rows_rejected": rejected}
    given.run.metrics(counts)
    if not snapshot.rows or rejected > config.source.max_rejected * read:
        _restore(spark, table, before)
        raise _refusal(config.source, rejects, read, rejected, reasons)
    given.run.dataset(snapshot, name="raw", context="ingested")
    return Made(
        rows=snapshot.rows,
        result={
            "snapshot": snapshot.model_dump(mode="json"),
            **counts,
            "rejects": str(rejects),
            "joins": joined_tables(config.source.joins),
        },
        outputs=[str(path) for path in snapshot.paths()],
        lines=[f"{read:,} rows read, {snapshot.rows:,} accepted, {rejected:,} rejected", *reasons],
    )


def parse(spark: SparkSession, source: Source) -> DataFrame:
    """All rows of the source's raw files, accepted or not, with `row_id`, position and, where given, `_split`.

    `row_id` is xxhash64 of the key: the columns of `source.key`, or (relative path, line number).
    """
    module = import_module(source_module(source))
    parts = []
    for split, files in raw_files(source).items():
        part: DataFrame = module.read(spark, source, files, root_of(source))
        parts.append(part.withColumn("_split", F.lit(split)) if split else part)
    rows = reduce(DataFrame.unionByName, parts)
    null_key = [F.when(F.col(name).isNull(), F.lit(f"{name}: wanted a key, seen null")) for name in source.key]
    return rows.withColumns(
        {
            "row_id": F.xxhash64(*(source.key or POSITION)),
            "_reason": F.coalesce("_reason", *null_key),
        }
    )


def source_module(source: Source) -> str:
    """The module that reads the source's format."""
    return f"pipelines.sources.{source.format}"


def _write_rejects(rows: DataFrame, path: Path, rejected: int) -> list[str]:
    """Write the rejected rows, and say for some of them why. An old reject table is emptied."""
    if not rejected and current_version(path) is None:
        return []
    columns = [*POSITION, "_raw", "_reason", "row_id"]
    write_table(rows.where(F.col("_reason").isNotNull()).select(columns), path, what="rejects")
    if not rejected:
        return []
    written = rows.sparkSession.read.format("delta").load(str(path))
    examples = written.orderBy(*POSITION).limit(3).collect()
    return [f"rejected {row['_file']} line {row['_line']}: {row['_reason']}" for row in examples]


def _restore(spark: SparkSession, table: Path, version: int | None) -> None:
    """Take back the version just written."""
    if version is None:
        shutil.rmtree(table)
    else:
        spark.sql(f"RESTORE TABLE delta.`{table}` TO VERSION AS OF {version}")


def _refusal(source: Source, rejects: Path, read: int, rejected: int, reasons: list[str]) -> DataError:
    if not read:
        paths = [str(file) for files in raw_files(source).values() for file in files]
        return DataError(f"source.paths: wanted rows in {', '.join(paths)}, seen none: the files are empty")
    return DataError(
        f"ingest: {rejected:,} of {read:,} rows do not fit the schema, source.max_rejected allows "
        f"{source.max_rejected:g}; {reasons[0] if reasons else ''}; all of them: {rejects}; mend the rows, the schema "
        "or the limit"
    )
