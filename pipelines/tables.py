"""Delta tables on Spark: read at a pinned version, write in one commit, count while writing."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from deltalake import DeltaTable, Schema
from deltalake.transaction import AddAction, CommitProperties, create_table_with_add_actions
from pyspark.sql import DataFrame, Observation, SparkSession
from pyspark.sql import functions as F
from pyspark.storagelevel import StorageLevel

from pipelines.assignment import partition
from pipelines.errors import LakeError
from pipelines.lake import Snapshot
from pipelines.session import size_shuffles, spark_progress

TABLE = "_table"  # the place of a row's table among several
_TASK_BYTES = 128 << 20  # more than that, and Spark makes several tasks a core, which even out as they run
_EVEN = 1.2  # rows of the longest task over an even share, up to which whole files are dealt evenly enough


def read_table(spark: SparkSession, snapshot: Snapshot) -> DataFrame:
    """The rows of a Snapshot, at its version."""
    size_shuffles(spark, sum(file.bytes for file in snapshot.files))
    return spark.read.format("delta").option("versionAsOf", snapshot.version).load(snapshot.table)


def read_dealt(spark: SparkSession, snapshot: Snapshot) -> DataFrame:
    """The rows of a Snapshot for work whose time goes with the rows: a task a core, each of about as many rows.

    Spark packs files by their bytes, each counted 4 MB larger than it is, so that unequal files of a few MB are dealt
    unevenly. Where whole files cannot be dealt evenly, or are too much for a task each, they are left to it.
    """
    table, cores = read_table(spark, snapshot), spark.sparkContext.defaultParallelism
    if not snapshot.rows or sum(file.bytes for file in snapshot.files) > cores * _TASK_BYTES:
        return table
    found = partition([file.rows for file in snapshot.files], cores)
    if found.objective > _EVEN * snapshot.rows / cores:
        return table
    paths, reader = snapshot.paths(), spark.read.schema(table.schema)
    groups = [found.tasks_of(core) for core in range(cores)]
    return reduce(DataFrame.union, (reader.parquet(*[str(paths[file]) for file in g]).coalesce(1) for g in groups if g))


@contextmanager
def kept(rows: DataFrame, *, level: StorageLevel = StorageLevel.MEMORY_AND_DISK_DESER) -> Iterator[DataFrame]:
    """The rows in memory or on disk, for the time of the body."""
    try:
        yield rows.persist(level)
    finally:
        rows.unpersist()


def schema_of(rows: DataFrame) -> str:
    """The columns and their types, as Spark's SQL declares them."""
    return ", ".join(f"`{name}` {dtype}" for name, dtype in rows.dtypes)


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
    return pinned(path, seen.get["rows"], seen.get["row_id_sum"])


@dataclass(frozen=True)
class Staged:
    """Parquet files that were written and belong to no table yet.

    Attributes:
        folder: Where they lie.
        schema: That of the tables to be.
    """

    folder: Path
    schema: Schema

    def commit(
        self,
        path: Path,
        *,
        metadata: dict[str, Any],
        mode: Literal["append", "overwrite"] = "overwrite",
        part: str = "",
    ) -> None:
        """Move the files, or those of a part, into the folder of the Delta table, and make them its next version.

        Args:
            path: The table's folder; made where it is missing.
            metadata: JSON that becomes the commit's `userMetadata`, atomic with the rows.
            mode: Whether the rows come to those of the version before, or take their place.
            part: A folder of a partition.
        """
        path.mkdir(parents=True, exist_ok=True)
        added: list[Any] = []
        for file in sorted((self.folder / part).glob("*.parquet")):
            if not (rows := pq.read_metadata(file).num_rows):
                continue
            file.rename(path / file.name)
            status = (path / file.name).stat()
            stats = json.dumps({"numRecords": rows})
            added.append(AddAction(file.name, status.st_size, {}, int(status.st_mtime * 1000), True, stats))
        properties = CommitProperties(custom_metadata={"userMetadata": json.dumps(metadata)})
        table = DeltaTable(str(path)) if DeltaTable.is_deltatable(str(path)) else None
        if table is not None and table.schema() == self.schema and not table.metadata().partition_columns:
            table.create_write_transaction(added, mode, self.schema, commit_properties=properties)
        else:
            assert mode == "overwrite" or table is None
            create_table_with_add_actions(str(path), self.schema, added, mode="overwrite", commit_properties=properties)


@contextmanager
def staged(
    rows: DataFrame, *, scratch: Path, what: str, compression: str | None = None, partition_by: str | None = None
) -> Iterator[Staged]:
    """Write `rows` to files that wait to be looked at and committed; what is not committed is removed.

    Args:
        rows: What to write.
        scratch: A folder in the tables' file system, which all nodes see.
        what: Named in the progress.
        compression: Codec of the files; Spark's own by default.
        partition_by: A column whose values become folders, and which the tables do not have.
    """
    staging = Path(tempfile.mkdtemp(dir=scratch))
    try:
        writer = rows.write.mode("overwrite")
        writer = writer.option("compression", compression) if compression is not None else writer
        writer = writer.partitionBy(partition_by) if partition_by is not None else writer
        with spark_progress(rows.sparkSession, what):
            writer.parquet(str(staging / "files"))
        kept = rows.drop(partition_by) if partition_by is not None else rows
        yield Staged(staging / "files", Schema.from_json(_nullable(kept.schema.json())))
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_tables(
    rows: DataFrame,
    paths: Sequence[Path],
    *,
    before: Sequence[Snapshot] = (),
    scratch: Path,
    what: str,
    metadata: dict[str, Any],
    compression: str,
) -> list[Snapshot]:
    """Overwrite several Delta tables, or append to them, in one pass over `rows`, whose column `TABLE` is the place of a
    row's table.

    Delta writes one table a query. So the files are written together, one folder a table, then moved into the tables'
    own and committed, a commit a table. Each task's rows must be of one table, and in the order that its file shall
    have.

    Args:
        rows: What to write, with a column `row_id`.
        paths: The tables' folders; made where they are missing.
        before: What the tables hold, where the rows come to it.
        scratch: A folder in the same file system, which all nodes see.
        what: Named in the progress.
        metadata: JSON that becomes each commit's `userMetadata`.
        compression: Codec of the files.

    Returns:
        The Snapshot of each new version, with the count and the sum of `row_id` observed while writing.
    """
    seen, asked = Observation(), []
    for place in range(len(paths)):
        row_id = F.when(F.col(TABLE) == place, F.col("row_id").cast("decimal(20,0)"))
        asked += [F.count(row_id).alias(f"rows {place}"), F.sum(row_id).alias(f"row_id_sum {place}")]
    observed = rows.observe(seen, *asked)
    with staged(observed, scratch=scratch, what=what, compression=compression, partition_by=TABLE) as files:
        snapshots = []
        for place, path in enumerate(paths):
            files.commit(path, metadata=metadata, mode="append" if before else "overwrite", part=f"{TABLE}={place}")
            num, row_id_sum = seen.get[f"rows {place}"], int(seen.get[f"row_id_sum {place}"] or 0)
            if before:
                num, row_id_sum = num + before[place].rows, row_id_sum + before[place].row_id_sum
            snapshots.append(pinned(path, num, row_id_sum))
        return snapshots


def pinned(path: Path, rows: int, row_id_sum: Any) -> Snapshot:
    """The Snapshot of what was just written, which must be the rows that were observed."""
    snapshot = Snapshot.open(path, row_id_sum=int(row_id_sum or 0))
    if snapshot.rows != rows:
        raise LakeError(f"{path}: {rows} rows were written, but the files hold {snapshot.rows}")
    return snapshot


def _nullable(schema: str) -> str:
    """Spark's JSON of a schema, which is Delta's, with every column nullable, as Spark writes them to Delta."""
    return schema.replace('"nullable":false', '"nullable":true').replace('"containsNull":false', '"containsNull":true')


def current_version(path: Path) -> int | None:
    """The latest version of the Delta table at `path`, or None where there is none."""
    return DeltaTable(str(path)).version() if DeltaTable.is_deltatable(str(path)) else None
