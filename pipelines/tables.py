"""Delta tables on Spark: read at a pinned version, write in one commit, count while writing."""

import json
from pathlib import Path
from typing import Any

from deltalake import DeltaTable
from pyspark.sql import DataFrame, Observation, SparkSession
from pyspark.sql import functions as F

from pipelines.errors import LakeError
from pipelines.lake import Snapshot
from pipelines.session import spark_progress


def read_table(spark: SparkSession, snapshot: Snapshot) -> DataFrame:
    """The rows of a Snapshot, at its version."""
    return spark.read.format("delta").option("versionAsOf", snapshot.version).load(snapshot.table)


def write_table(
    rows: DataFrame,
    path: Path,
    *,
    what: str,
    metadata: dict[str, Any] | None = None,
    compression: str | None = None,
) -> Snapshot:
    """Overwrite the Delta table at `path` with `rows`, which have a `row_id` column, in one commit.

    Args:
        rows: What to write.
        path: The table's folder; made where it is missing.
        what: Named in the progress.
        metadata: JSON that becomes the commit's `userMetadata`, atomic with the rows.
        compression: Codec of the files; Spark's own by default.

    Returns:
        The Snapshot of the new version, with the count and the sum of `row_id` observed while writing.
    """
    seen = Observation()
    # Spark 4 raises when a sum of int64 hashes overflows; as decimals they add up exactly.
    row_id_sum = F.sum(F.col("row_id").cast("decimal(20,0)"))
    rows = rows.observe(seen, F.count(F.lit(1)).alias("rows"), row_id_sum.alias("row_id_sum"))
    writer = rows.write.format("delta").mode("overwrite").option("overwriteSchema", "true")
    if metadata is not None:
        writer = writer.option("userMetadata", json.dumps(metadata))
    if compression is not None:
        writer = writer.option("compression", compression)
    with spark_progress(rows.sparkSession, what):
        writer.save(str(path))
    snapshot = Snapshot.open(path, row_id_sum=int(seen.get["row_id_sum"] or 0))
    if snapshot.rows != seen.get["rows"]:
        raise LakeError(f"{path}: {seen.get['rows']} rows were written, but the files hold {snapshot.rows}")
    return snapshot


def current_version(path: Path) -> int | None:
    """The latest version of the Delta table at `path`, or None where there is none."""
    return DeltaTable(str(path)).version() if DeltaTable.is_deltatable(str(path)) else None
