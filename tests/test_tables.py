"""Delta tables as Spark reads them."""

from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import write_deltalake
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from pipelines.lake import Snapshot
from pipelines.tables import read_dealt, read_table


@pytest.mark.parametrize(
    "rows", [[5000, 3000, 2000, 1000, 100, 100], [9000, 10], [7], []], ids=["unequal", "one large", "one", "none"]
)
def test_files_are_dealt_evenly_and_no_row_is_lost(spark: SparkSession, tmp_path: Path, rows: list[int]) -> None:
    cores, schema, start = spark.sparkContext.defaultParallelism, pa.schema({"row_id": pa.int64(), "x": pa.string()}), 0
    is_unequal = len(rows) > 2
    rows *= cores if is_unequal else 1
    write_deltalake(tmp_path / "t", schema.empty_table(), mode="overwrite")
    for num in rows:
        ids = list(range(start, start + num))
        write_deltalake(tmp_path / "t", pa.table({"row_id": ids, "x": [f"{i}" for i in ids]}, schema), mode="append")
        start += num
    snapshot = Snapshot.open(tmp_path / "t")
    write_deltalake(tmp_path / "t", pa.table({"row_id": [-1], "x": ["later"]}, schema), mode="append")
    dealt = read_dealt(spark, snapshot)
    assert dealt.schema == read_table(spark, snapshot).schema
    assert sorted(dealt.collect()) == [(i, f"{i}") for i in range(start)]
    by_task = dealt.groupBy(F.spark_partition_id()).count().toArrow().column("count").to_pylist()
    if is_unequal:
        assert len(by_task) == cores
        assert max(by_task) <= 1.2 * start / cores
