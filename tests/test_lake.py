"""A Snapshot pins what is there, and refuses what would give other rows than the files hold."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import write_deltalake
from pyspark.sql import SparkSession
from sklearn.utils.class_weight import compute_class_weight

from pipelines.errors import ConfigError, LakeError
from pipelines.lake import UINT64, LabelSpec, Snapshot
from pipelines.lake.row_ids import position_ids


def write(path: Path, ids: list[int], **options: Any) -> None:
    write_deltalake(str(path), pa.table({"row_id": pa.array(ids, pa.int64()), "x": pa.array(ids)}), **options)


def test_pins_a_version_with_rows_and_digest(tmp_path: Path) -> None:
    table = tmp_path / "t"
    write(table, [1, 2, -5])
    write(table, [2**62, 2**62, 2**62], mode="append")
    first, second = Snapshot.open(table, version=0), Snapshot.open(table)
    assert (first.version, first.rows, first.row_id_sum) == (0, 3, (-2) % UINT64)
    assert (second.version, second.rows, second.row_id_sum) == (1, 6, (3 * 2**62 - 2) % UINT64)
    assert first.digest != second.digest
    assert [file.path for file in second.files] == sorted(file.path for file in second.files)
    assert second.missing() == []


def test_travels_as_json(tmp_path: Path) -> None:
    write(tmp_path / "t", list(range(10)))
    snapshot = Snapshot.open(tmp_path / "t")
    again = Snapshot.model_validate_json(snapshot.model_dump_json())
    assert again == snapshot and again.digest == snapshot.digest


def test_row_digest_is_that_of_the_rows_alone(tmp_path: Path) -> None:
    write(tmp_path / "a", [1, 2, 3])
    write(tmp_path / "b", [3])
    write(tmp_path / "b", [2, 1], mode="append")
    a, b = Snapshot.open(tmp_path / "a"), Snapshot.open(tmp_path / "b")
    assert a.row_digest == b.row_digest and a.digest != b.digest


def test_weights_of_classes_are_1_on_average() -> None:
    label = LabelSpec(kind="multiclass", column="y", classes=("a", "b", "c"), counts=(60, 30, 10))
    assert label.weights(None) == ()
    balanced = compute_class_weight("balanced", classes=np.arange(3), y=np.repeat([0, 1, 2], label.counts))
    assert label.weights("balanced") == pytest.approx(tuple(balanced))
    named = label.weights({"c": 6})
    assert named[2] == pytest.approx(6 * named[0]) and named[0] == named[1]
    assert np.dot(named, label.counts) == pytest.approx(100)
    with pytest.raises(ConfigError, match="class_weights: wanted classes among a, b, c, seen d"):
        label.weights({"d": 1})


def test_a_missing_version_is_named(tmp_path: Path) -> None:
    write(tmp_path / "t", [1])
    for version in (7, -1):
        with pytest.raises(LakeError, match=rf"wanted version {version}, which is not there \(latest: 0\)"):
            Snapshot.open(tmp_path / "t", version=version)


def test_no_table(tmp_path: Path) -> None:
    with pytest.raises(LakeError, match="wanted a Delta table, seen none"):
        Snapshot.open(tmp_path / "nothing")


def test_files_that_are_gone_or_damaged(tmp_path: Path) -> None:
    write(tmp_path / "t", [1, 2])
    snapshot = Snapshot.open(tmp_path / "t")
    (path,) = snapshot.paths()
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    assert snapshot.missing() == [path]
    with pytest.raises(LakeError, match=f"wanted {len(content)} bytes"):
        Snapshot.open(tmp_path / "t")
    path.write_bytes(b"x" * len(content))
    with pytest.raises(LakeError, match="not a Parquet file"):
        Snapshot.open(tmp_path / "t")
    path.unlink()
    with pytest.raises(LakeError, match=r"1 are gone \(VACUUM\?\)"):
        Snapshot.open(tmp_path / "t")


def test_without_row_id_rows_are_known_by_their_position(tmp_path: Path) -> None:
    write_deltalake(str(tmp_path / "t"), pa.table({"x": [1, 2, 3]}))
    snapshot = Snapshot.open(tmp_path / "t")
    assert snapshot.row_ids == "position" and snapshot.rows == 3
    assert snapshot.row_id_sum == sum(position_ids(0, 3).tolist()) % UINT64
    assert len(set(position_ids(0, 100_000).tolist())) == 100_000


def test_partition_columns_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "t", [1, 2], partition_by=["x"])
    with pytest.raises(LakeError, match=r"partition columns \['x'\]"):
        Snapshot.open(tmp_path / "t")


def test_deletion_vectors_are_refused(spark: SparkSession, tmp_path: Path) -> None:
    path = tmp_path / "t"
    rows = spark.range(100).selectExpr("id as row_id")
    rows.coalesce(1).write.format("delta").option("delta.enableDeletionVectors", "true").save(str(path))
    assert Snapshot.open(path).rows == 100, "the feature alone does no harm"
    spark.sql(f"DELETE FROM delta.`{path}` WHERE row_id = 7")
    with pytest.raises(LakeError, match="seen deletion vectors"):
        Snapshot.open(path)
    assert Snapshot.open(path, version=0).rows == 100


def test_column_mapping_is_refused(spark: SparkSession, tmp_path: Path) -> None:
    path = tmp_path / "t"
    rows = spark.range(10).selectExpr("id as row_id")
    rows.write.format("delta").option("delta.columnMapping.mode", "name").save(str(path))
    with pytest.raises(LakeError, match="seen column mapping"):
        Snapshot.open(path)


def test_the_sum_of_many_rows_is_exact(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(-(2**63), 2**63, 10_000, dtype=np.int64)
    write(tmp_path / "t", ids.tolist())
    assert Snapshot.open(tmp_path / "t").row_id_sum == sum(ids.tolist()) % UINT64


def test_a_log_with_an_unknown_entry_is_read(tmp_path: Path) -> None:
    write(tmp_path / "t", [1])
    log = tmp_path / "t" / "_delta_log" / f"{0:020}.json"
    log.write_text(log.read_text().rstrip() + "\n" + json.dumps({"commitInfo": {"userMetadata": "not ours"}}) + "\n")
    assert Snapshot.open(tmp_path / "t").contract is None
