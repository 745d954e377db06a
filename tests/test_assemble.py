"""Each MLlib family gets its inputs as it should: ids never as numbers, sparse vectors sparse."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pyspark import cloudpickle
from pyspark.ml.linalg import DenseVector, SparseVector
from pyspark.sql import DataFrame, SparkSession

from pipelines.assemble import VECTOR, _to_vectors, assemble, num_bins, vector_size
from pipelines.lake import Column, Contract, Snapshot
from pipelines.stream.reader import Arrays, read_shards
from pipelines.stream.shards import shards_of
from pipelines.tables import read_table
from tests.tables import DENSE, IDS, IMAGE, SPARSE, contract_of, feature_table

LINEAR, TREE = "LogisticRegression", "GBTClassifier"


def table(spark: SparkSession, path: Path, *inputs: object) -> tuple[Contract, DataFrame, Arrays]:
    snapshot: Snapshot = feature_table(path, [20], contract_of(*inputs))  # type: ignore[arg-type]
    assert snapshot.contract is not None
    arrays = read_shards(shards_of(snapshot), snapshot.contract.columns)
    return snapshot.contract, read_table(spark, snapshot), arrays


def vectors(rows: DataFrame, arrays: Arrays) -> list[object]:
    found = {row["row_id"]: row[VECTOR] for row in rows.collect()}
    return [found[i] for i in arrays["row_id"].tolist()]


def test_linear_models_see_ids_one_hot(spark: SparkSession, tmp_path: Path) -> None:
    contract, rows, arrays = table(spark, tmp_path / "t", DENSE, IDS)
    assembled = assemble(rows, contract, estimator=LINEAR, keep=["row_id"])
    assert vector_size(contract, estimator=LINEAR) == 4 + 5 + 3
    for vector, dense, ids in zip(vectors(assembled, arrays), arrays["dense"], arrays["ids"], strict=True):
        wanted = np.zeros(12)
        wanted[:4] = dense
        wanted[4 + ids[0]] = wanted[9 + ids[1]] = 1
        np.testing.assert_allclose(vector.toArray(), wanted)  # type: ignore[attr-defined]


def test_trees_see_nominal_attributes(spark: SparkSession, tmp_path: Path) -> None:
    contract, rows, arrays = table(spark, tmp_path / "t", DENSE, IDS)
    assembled = assemble(rows, contract, estimator=TREE, keep=["row_id"])
    for vector, dense, ids in zip(vectors(assembled, arrays), arrays["dense"], arrays["ids"], strict=True):
        np.testing.assert_allclose(vector.toArray(), [*dense, *ids])  # type: ignore[attr-defined]
    attributes = assembled.schema[VECTOR].metadata["ml_attr"]["attrs"]
    assert [(a["idx"], a["num_vals"]) for a in attributes["nominal"]] == [(4, 5), (5, 3)] and num_bins(contract) == 5
    assert vector_size(contract, estimator=TREE) == 6


def test_trees_see_buckets_as_numbers(spark: SparkSession, tmp_path: Path) -> None:
    buckets = IDS.model_copy(update={"ordered": (True, False)})
    contract, rows, arrays = table(spark, tmp_path / "t", buckets)
    assembled = assemble(rows, contract, estimator=TREE, keep=["row_id"])
    np.testing.assert_array_equal([v.toArray() for v in vectors(assembled, arrays)], arrays["ids"])  # type: ignore[attr-defined]
    attributes = assembled.schema[VECTOR].metadata["ml_attr"]["attrs"]
    assert [a["idx"] for a in attributes["nominal"]] == [1] and num_bins(contract) == 3
    assert vector_size(contract, estimator=LINEAR) == 5 + 3, "linear models see each bucket"


def test_sparse_inputs_stay_sparse_and_exact(spark: SparkSession, tmp_path: Path) -> None:
    contract, rows, arrays = table(spark, tmp_path / "t", *SPARSE)
    rows = rows.selectExpr(
        "row_id",
        "label",
        "transform(sequence(0, 2), i -> cast(i * 2 as bigint)) as words_ids",
        "array(0f, 0.1f, cast(1/3d as float)) as words_weights",
    )
    for vector in vectors(assemble(rows, contract, estimator=LINEAR, keep=["row_id"]), arrays):
        assert isinstance(vector, SparseVector) and vector.size == 7
        assert list(vector.indices) == [2, 4], "padding and zeros are left out"
        assert list(vector.values) == [float(np.float32(0.1)), float(np.float32(1 / 3))]


def test_images_are_scaled(spark: SparkSession, tmp_path: Path) -> None:
    contract, rows, arrays = table(spark, tmp_path / "t", IMAGE)
    for vector, image in zip(
        vectors(assemble(rows, contract, estimator=LINEAR, keep=["row_id"]), arrays), arrays["image"], strict=True
    ):
        assert isinstance(vector, DenseVector)
        np.testing.assert_allclose(vector.toArray(), image.ravel() / 255 * 2 - 1, atol=1e-12)


def test_the_schema_names_no_value_of_a_vocabulary(spark: SparkSession, tmp_path: Path) -> None:
    """Which may have millions."""
    wide = IDS.model_copy(update={"sizes": (3_000_000, 3)})
    contract, rows, arrays = table(spark, tmp_path / "t", DENSE, wide)
    assembled = assemble(rows, contract, estimator=LINEAR, keep=["row_id"])
    for vector, dense, ids in zip(vectors(assembled, arrays), arrays["dense"], arrays["ids"], strict=True):
        assert vector.indices.tolist() == [0, 1, 2, 3, 4 + ids[0], 3_000_004 + ids[1]]  # type: ignore[attr-defined]
        assert vector.values.tolist() == [*map(float, dense), 1.0, 1.0]  # type: ignore[attr-defined]
    for estimator in (LINEAR, TREE):
        assert len(assemble(rows, contract, estimator=estimator, keep=["row_id"]).schema.json()) < 5000


def test_sparks_workers_need_not_have_the_package() -> None:
    """A logged model may be applied in any Spark session."""
    code = "import pickle, sys; sys.modules['pipelines'] = None; print(list(pickle.load(sys.stdin.buffer)([])))"
    done = subprocess.run(
        [sys.executable, "-c", code], input=cloudpickle.dumps(_to_vectors(3)), capture_output=True, check=True
    )
    assert done.stdout.strip() == b"[]"


@pytest.mark.parametrize("estimator", [LINEAR, TREE])
@pytest.mark.parametrize("others", [(), SPARSE])
def test_all_kinds_together(spark: SparkSession, tmp_path: Path, estimator: str, others: tuple[Column, ...]) -> None:
    contract, rows, arrays = table(spark, tmp_path / "t", IDS, *others, IMAGE, DENSE)
    if others:
        words = "transform(sequence(0, 2), i -> cast(i * 2 as bigint)) as words_ids"
        rows = rows.drop("words_ids", "words_weights")
        rows = rows.selectExpr("*", words, "array(0f, 0.5f, cast(null as float)) as words_weights")
    assembled = assemble(rows, contract, estimator=estimator, keep=["row_id"])
    for at, vector in enumerate(vectors(assembled, arrays)):
        p, q = arrays["ids"][at]
        ids = np.array([p, q]) if estimator == TREE else np.concatenate([np.eye(5)[p], np.eye(3)[q]])
        bag = [[0, 0, 0.5, 0, 0, 0, 0]] if others else []
        wanted = np.concatenate([ids, *bag, arrays["image"][at].ravel() / 255 * 2 - 1, arrays["dense"][at]])
        assert vector.size == vector_size(contract, estimator=estimator) == len(wanted)  # type: ignore[attr-defined]
        np.testing.assert_allclose(vector.toArray(), wanted, atol=1e-12)  # type: ignore[attr-defined]
