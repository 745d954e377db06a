"""Feature tables that grow by the rows that came, by the transform as it was fitted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from pipelines.config import load_config
from pipelines.errors import DataError
from pipelines.features.fitted import FittedFeatures
from pipelines.features.split import with_split
from pipelines.features.tables import feature_rows
from pipelines.lake import Snapshot, receipt_path, table_path
from pipelines.receipt import Receipt
from pipelines.tables import current_version, read_table
from tests.stages import features_of, run

Workload = Callable[..., Path]
KEPT = ("features.refit=false",)
SPLITS = ("train", "test", "validation")


@pytest.fixture
def grown(workload: Workload, rows_csv: Callable[..., str], tmp_path: Path) -> Callable[..., Path]:
    """A workload of 300 rows whose features were made; called again it gets another file."""

    def make(more: str | None = None, **sections: Any) -> Path:
        if more is None:
            split = {"hash": {"shares": {"train": 0.6, "test": 0.4}}, "validation": {"share": 0.2}}
            path = workload(rows_csv(300), split=split, **sections)
            run(path, "ingest", "features", overrides=KEPT)
            return path
        (tmp_path / "raw" / "more.csv").write_text(more)
        return tmp_path / "tiny.yaml"

    return make


def contents(spark: SparkSession, receipt: Receipt) -> dict[str, list[Any]]:
    receipts = {"features": receipt}
    tables = {split: features_of(spark, receipts, split) for split in SPLITS}
    for snapshot, _ in tables.values():
        assert Snapshot.open(snapshot.table).row_digest == snapshot.row_digest, "row ids are added up anew"
    return {split: table.orderBy("row_id").collect() for split, (_, table) in tables.items()}


def expected(spark: SparkSession, path: Path, receipts: dict[str, Receipt]) -> dict[str, list[Any]]:
    """All rows of the ingested table by the transform in the receipt."""
    config, result = load_config(path), receipts["features"].result
    raw = Snapshot.model_validate(receipts["ingest"].result["snapshot"])
    contract = Snapshot.model_validate(result["snapshots"]["train"]).contract
    assert contract is not None
    fitted = FittedFeatures.model_validate(result["fitted"])
    table = feature_rows(with_split(read_table(spark, raw), config), fitted, contract, SPLITS).orderBy("row_id")
    return {split: table.where(f"_table = {i}").drop("_table").collect() for i, split in enumerate(SPLITS)}


def test_new_rows_come_to_those_that_are_there(
    spark: SparkSession, lake: Path, grown: Callable[..., Path], rows_csv: Callable[..., str], capsys: Any
) -> None:
    path = grown()
    before = run(path, "ingest", "features", overrides=KEPT)["features"]
    old_receipt = receipt_path("tiny", "features").read_bytes()
    grown(rows_csv(60, seed=1))
    receipts = run(path, "ingest", "features", overrides=KEPT)
    after = receipts["features"]
    assert "keeps the fitted transform, reads the new files of the table (1 of 2)" in capsys.readouterr().out
    assert after.rows == 360 and after.result["fitted"] == before.result["fitted"]
    for split in SPLITS:
        files = [{f["path"] for f in receipt.result["snapshots"][split]["files"]} for receipt in (before, after)]
        assert files[0] < files[1], "what was there stays as it is"
    assert contents(spark, after) == expected(spark, path, receipts)

    receipt_path("tiny", "features").write_bytes(old_receipt)  # as if it was killed behind its last commit
    again = run(path, "features", overrides=KEPT)["features"]
    assert again.rows == 360 and contents(spark, again) == contents(spark, after)


def test_why_all_rows_are_read(
    spark: SparkSession, lake: Path, grown: Callable[..., Path], rows_csv: Callable[..., str], capsys: Any
) -> None:
    path = grown()
    grown(rows_csv(30, seed=1))
    changed = run(path, "ingest", "features", overrides=(*KEPT, "features.inputs.dense.steps=[impute_median]"))
    assert "fits anew in spite of features.refit: config features changed" in capsys.readouterr().out
    assert changed["features"].rows == 330
    run(path, "features")
    (path.parent / "raw" / "third.csv").write_text(rows_csv(30, seed=2))
    receipts = run(path, "ingest", "features")
    said = capsys.readouterr().out
    assert "reads all rows: those that came move the fitted values" in said and receipts["features"].rows == 360
    assert contents(spark, receipts["features"]) == expected(spark, path, receipts)


def test_rows_that_do_not_fit_leave_the_tables_as_they_are(
    spark: SparkSession, lake: Path, grown: Callable[..., Path]
) -> None:
    path = grown(
        features={
            "label": {"column": "y", "kind": "binary", "positive": [1], "negative": [0]},
            "inputs": {"dense": {"columns": ["a", "b"], "steps": ["standardize"]}},
        }
    )
    versions = [current_version(table_path("tiny", f"features/{split}")) for split in SPLITS]
    grown("1,2,red,7\n,2,red,1\n3,4,red,1\n")
    with pytest.raises(
        DataError, match="features: (label|dense): wanted rows that the kept transform takes, seen 1 new"
    ):
        run(path, "ingest", "features", overrides=KEPT)
    assert versions == [current_version(table_path("tiny", f"features/{split}")) for split in SPLITS]


def test_a_key_that_is_there_already_is_refused(
    spark: SparkSession, lake: Path, workload: Workload, tmp_path: Path
) -> None:
    text = "".join(f"{i},{i % 7},red,{i % 2}\n" for i in range(100))
    source = {"format": "csv", "paths": str(tmp_path / "raw" / "*.csv"), "key": ["a"]}
    path = workload(text, source={**source, "schema": "a int, b double, color string, y int"})
    run(path, "ingest", "features", overrides=KEPT)
    (tmp_path / "raw" / "more.csv").write_text("5,1,red,1\n200,2,red,0\n")
    with pytest.raises(DataError, match="source.key: wanted one row a key, seen a=5"):
        run(path, "ingest", "features", overrides=KEPT)
