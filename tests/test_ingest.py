"""Ingest: accepted + rejected = read, rejects are kept with their place, and a failure leaves what was there."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from pipelines.errors import DataError
from pipelines.lake import Snapshot, receipt_path, table_path
from pipelines.receipt import read_receipt
from pipelines.tables import read_table
from tests.stages import run

Workload = Callable[..., Path]
GOOD, BAD = "1,2,red,0\n3,4,blue,1\n5,6,red,1\n", "x,2,red,0\n1,2\n"


def test_accepted_and_rejected_add_up(spark: SparkSession, lake: Path, workload: Workload) -> None:
    path = workload(GOOD + BAD)
    receipt = run(path, "ingest", overrides=("source.max_rejected=0.5",))["ingest"]
    result = receipt.result
    assert (result["rows_read"], result["rows_accepted"], result["rows_rejected"]) == (5, 3, 2)
    rows = read_table(spark, Snapshot.model_validate(result["snapshot"])).orderBy("_line").collect()
    assert [row["a"] for row in rows] == [1.0, 3.0, 5.0] and "_raw" not in rows[0].asDict()
    rejects = spark.read.format("delta").load(result["rejects"]).orderBy("_line").collect()
    assert [(r["_file"], r["_line"], r["_raw"], r["_reason"]) for r in rejects] == [
        ("rows.csv", 4, "x,2,red,0", "a: wanted double, seen 'x'"),
        ("rows.csv", 5, "1,2", "wanted 4 fields, seen another number"),
    ]


def test_too_many_rejects_fail_after_they_were_written(spark: SparkSession, lake: Path, workload: Workload) -> None:
    path = workload(GOOD + BAD)
    with pytest.raises(DataError, match=r"2 of 5 rows do not fit .* rejected rows\.csv line 4: a: wanted double"):
        run(path, "ingest")
    assert not table_path("tiny", "raw").exists() and read_receipt(receipt_path("tiny", "ingest")) is None
    assert spark.read.format("delta").load(str(table_path("tiny", "raw_rejects"))).count() == 2


def test_a_failure_leaves_the_rows_of_before(spark: SparkSession, lake: Path, workload: Workload) -> None:
    before = run(workload(GOOD), "ingest")["ingest"]
    with pytest.raises(DataError):
        run(workload(GOOD + BAD), "ingest")
    assert read_receipt(receipt_path("tiny", "ingest")) == before
    latest = Snapshot.open(table_path("tiny", "raw"))
    assert latest.row_digest == Snapshot.model_validate(before.result["snapshot"]).row_digest
    after = run(workload(GOOD), "ingest")["ingest"]
    assert after == before, "mended, the stage is up to date again"


def test_mended_rows_empty_the_reject_table(spark: SparkSession, lake: Path, workload: Workload) -> None:
    with pytest.raises(DataError):
        run(workload(GOOD + BAD), "ingest")
    run(workload(GOOD), "ingest")
    assert spark.read.format("delta").load(str(table_path("tiny", "raw_rejects"))).count() == 0


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_files_without_rows(spark: SparkSession, lake: Path, workload: Workload, text: str) -> None:
    with pytest.raises(DataError, match="seen none: the files are empty"):
        run(workload(text), "ingest")
    assert read_receipt(receipt_path("tiny", "ingest")) is None


def test_a_header_without_rows(spark: SparkSession, lake: Path, workload: Workload) -> None:
    path = workload("a,b,color,y\n")
    with pytest.raises(DataError, match=r"rows\.csv, seen none: the files are empty"):
        run(path, "ingest", overrides=("source.options={header: true}",))


def test_a_missing_file(spark: SparkSession, lake: Path, workload: Workload) -> None:
    with pytest.raises(DataError, match="wanted csv files at .*HEADRACE_DATA"):
        run(workload(), "ingest")


def test_given_splits_are_columns(spark: SparkSession, lake: Path, workload: Workload, tmp_path: Path) -> None:
    path = workload(GOOD)
    (tmp_path / "raw" / "t.csv").write_text("7,8,red,0\n")
    paths = f"{{train: {tmp_path}/raw/rows.csv, test: {tmp_path}/raw/t.csv}}"
    receipt = run(path, "ingest", overrides=(f"source.paths={paths}", "split={given: [train, test]}"))["ingest"]
    rows = read_table(spark, Snapshot.model_validate(receipt.result["snapshot"])).collect()
    assert sorted((row["_split"], row["_file"]) for row in rows) == [("test", "t.csv"), *[("train", "rows.csv")] * 3]
