"""The fitted transform: learned on the training split, the same wherever it is applied, written for training."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from pipelines.config import load_config
from pipelines.errors import DataError
from pipelines.features.apply import transform
from pipelines.features.fit import fit
from pipelines.features.fitted import FittedFeatures
from pipelines.features.split import with_split
from pipelines.lake import Snapshot
from pipelines.stream.reader import read_shards
from pipelines.stream.shards import shards_of
from tests.stages import features_of, run

Workload = Callable[..., Path]
Rows = Callable[..., str]


def fitted_on(
    spark: SparkSession, workload: Workload, rows: list[tuple[Any, ...]], **inputs: Any
) -> tuple[FittedFeatures, list[str]]:
    """Fit inputs on rows of (a, b, color, y, split)."""
    features = {"label": {"column": "y", "kind": "binary", "positive": [1], "negative": [0]}, "inputs": inputs}
    config = load_config(workload("", features=features))
    table = spark.createDataFrame(rows, "a double, b double, color string, y int, _split string")
    found = fit(table, config)
    return found.fitted, found.notes


def applied(spark: SparkSession, fitted: FittedFeatures, rows: list[tuple[Any, ...]], name: str) -> list[list[float]]:
    table = spark.createDataFrame(
        [(i, *row) for i, row in enumerate(rows)], "i int, a double, b double, color string, y int"
    )
    return [row[name] for row in transform(table, fitted, keep=["i"]).orderBy("i").collect()]


TRAIN = [
    (1.0, 10.0, "red", 1, "train"),
    (3.0, None, "red", 0, "train"),
    (8.0, 30.0, None, 1, "train"),
    (None, 50.0, "blue", 0, "train"),
    (1000.0, 1000.0, "green", 0, "test"),
]


@pytest.mark.parametrize(
    ("steps", "seen", "wanted"),
    [
        (["impute_mean"], [None, 2.0], [4.0, 2.0]),
        (["impute_median"], [None, 2.0], [3.0, 2.0]),
        ([{"impute_constant": {"value": -1}}], [None, 2.0], [-1.0, 2.0]),
        (["impute_mean", "log1p"], [None, 2.0, -5.0], [math.log(5), math.log(3), 0.0]),
        (["impute_mean", "min_max"], [1.0, 8.0, None, 15.0], [0.0, 1.0, 3 / 7, 2.0]),
        ([{"impute_constant": {"value": 22}}, "min_max"], [1.0, 22.0], [0.0, 1.0]),
        (["impute_most_frequent"], [None, 2.0], [1.0, 2.0]),
        (["impute_mean", "signed_log"], [None, 2.0, -2.0, -0.0], [math.log(5), math.log(3), -math.log(3), 0.0]),
        (["impute_mean", {"clip": {"low": 2, "high": 5}}], [1.0, 3.0, 9.0, None], [2.0, 3.0, 5.0, 4.0]),
        (["impute_mean", {"clip": {"quantiles": [0, 0.5]}}, "min_max"], [-7.0, 3.0, 9.0], [0.0, 1.0, 1.0]),
        (["impute_median", "robust_scale"], [3.0, 8.0, 1.0, None], [0.0, 5 / 7, -2 / 7, 0.0]),
    ],
)
def test_numbers(
    spark: SparkSession, workload: Workload, steps: list[Any], seen: list[Any], wanted: list[float]
) -> None:
    fitted, _ = fitted_on(spark, workload, TRAIN, x={"columns": ["a"], "steps": steps})
    got = applied(spark, fitted, [(a, None, None, 0) for a in seen], "x")
    np.testing.assert_allclose([row[0] for row in got], wanted, rtol=1e-6)


def test_standardize_counts_imputed_rows_and_logarithms(spark: SparkSession, workload: Workload) -> None:
    fitted, _ = fitted_on(
        spark, workload, TRAIN, x={"columns": ["a"], "steps": ["impute_median", "log1p", "standardize"]}
    )
    values = np.log1p([1.0, 3.0, 8.0, 3.0])
    got = applied(spark, fitted, [(a, None, None, 0) for a in (1.0, 3.0, 8.0, None)], "x")
    np.testing.assert_allclose([row[0] for row in got], (values - values.mean()) / values.std(), rtol=1e-5)


def test_moments_behind_a_clip_at_quantiles(spark: SparkSession, workload: Workload) -> None:
    rows = [(float(i), 0.0, "", 0, "train") for i in range(1000)] + [(1e12, 0.0, "", 0, "train")]
    rows += [(None, 0.0, "", 0, "train")] * 9 + [(0.0, 0.0, "", 0, "test")]
    steps = ["impute_median", {"clip": {"quantiles": [0.1, 0.9]}}, "log1p", "standardize"]
    fitted, _ = fitted_on(spark, workload, rows, x={"columns": ["a"], "steps": steps})
    values = np.log1p(np.clip([500.0] * 9 + [r[0] for r in rows if r[0] is not None and r[4] == "train"], 100, 900))
    seen = [0.0, 100.0, 500.0, 1e12, None]
    got = applied(spark, fitted, [(a, None, None, 0) for a in seen], "x")
    wanted = np.log1p(np.clip([0.0, 100.0, 500.0, 1e12, 500.0], 100, 900))
    np.testing.assert_allclose([row[0] for row in got], (wanted - values.mean()) / values.std(), rtol=1e-5)


def test_missing_values_as_a_feature(spark: SparkSession, workload: Workload) -> None:
    x = {"columns": ["a", "color"], "steps": ["missing_indicator"]}
    fitted, _ = fitted_on(spark, workload, TRAIN, x=x)
    rows = [(1.0, None, None, 0), (None, None, "", 0), (math.nan, None, "red", 0)]
    assert applied(spark, fitted, rows, "x") == [[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]
    (column,) = (c for c in fitted.contract(sparse_widths={}).columns if c.name == "x")
    assert column.names == ("a is missing", "color is missing")


def test_dates_become_numbers(spark: SparkSession, workload: Workload) -> None:
    source = {"format": "csv", "paths": "x", "schema": "born date, seen timestamp, y int"}
    inputs = {
        "parts": {
            "columns": ["born"],
            "steps": [{"date": {"parts": ["year", "month", "day_of_week"]}}, "impute_median"],
        },
        "cycle": {"columns": ["born"], "steps": [{"date": {"parts": ["month"], "cyclic": True}}]},
        "age": {"columns": ["seen"], "steps": [{"age": {"against": "born"}}, {"impute_constant": {"value": -1}}]},
    }
    features = {"label": {"column": "y", "kind": "binary", "positive": [1]}, "inputs": inputs}
    config = load_config(workload("", source=source, features=features))
    rows = [("2026-11-22", "2026-11-24 12:00:00", 1), (None, "2026-01-01 00:00:00", 0), ("2024-02-29", None, 0)]
    table = spark.createDataFrame(rows, "born string, seen string, y int")
    table = table.selectExpr("cast(born as date) born", "cast(seen as timestamp) seen", "y")
    both = table.selectExpr("*", "'train' _split").union(table.selectExpr("*", "'test' _split"))
    found = transform(table, fit(both, config).fitted, keep=["y"]).collect()
    assert [row["parts"] for row in found] == [[2026, 11, 7], [2024, 2, 4], [2024, 2, 4]], "a Sunday, a Thursday"
    np.testing.assert_allclose(found[0]["cycle"], [-0.5, math.sqrt(3) / 2], rtol=1e-6)
    assert found[1]["cycle"] == [0.0, 0.0]
    assert [row["age"] for row in found] == [[2.5], [-1.0], [-1.0]]


def test_frequencies(spark: SparkSession, workload: Workload) -> None:
    fitted, _ = fitted_on(spark, workload, TRAIN, x={"columns": ["color"], "steps": ["frequency"]})
    rows = [(0.0, 0.0, color, 0) for color in ("red", "blue", None, "green")]
    assert applied(spark, fitted, rows, "x") == [[0.5], [0.25], [0.25], [0.0]]


def test_a_cross_is_a_value_of_its_own(spark: SparkSession, workload: Workload) -> None:
    rows = [(0.0, 0.0, color, y, split) for color, y, split in (("a", 1, "train"), ("b", 0, "train"), ("a", 0, "test"))]
    table = [(*row, kind) for row, kind in zip(rows, ("x", "y", "x"), strict=True)]
    source = {"format": "csv", "paths": "x", "schema": "a double, b double, color string, y int, kind string"}
    features = {
        "label": {"column": "y", "kind": "binary", "positive": [1]},
        "inputs": {"x": {"columns": ["color", "kind"], "steps": ["cross", "vocabulary"]}},
    }
    config = load_config(workload("", source=source, features=features))
    schema = "a double, b double, color string, y int, _split string, kind string"
    fitted = fit(spark.createDataFrame(table, schema), config).fitted
    pairs = [("a", "x"), ("b", "y"), ("a", "y"), ("b", None)]
    got = transform(spark.createDataFrame(pairs, "color string, kind string"), fitted, keep=[]).collect()
    assert [row["x"] for row in got] == [[1], [2], [0], [0]]
    assert fitted.inputs[0].columns[0].name == "color x kind"


def test_target_encoding_keeps_a_rows_own_label_out(spark: SparkSession, workload: Workload) -> None:
    """A category a row: its mean is its label. Out of fold nothing of it is left."""
    steps = [{"target": {"smoothing": 1, "folds": 4}}]
    features = {
        "label": {"column": "y", "kind": "binary", "positive": [1]},
        "inputs": {"x": {"columns": ["color"], "steps": steps}},
    }
    config = load_config(workload("", features=features))
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 400).tolist()
    rows = [(i * 7919, 0.0, 0.0, f"v{i}" if i < 200 else "often", labels[i], "train") for i in range(400)]
    schema = "row_id bigint, a double, b double, color string, y int, _split string"
    table = spark.createDataFrame([*rows, (-1, 0.0, 0.0, "v1", 0, "test")], schema)
    fitted = fit(table, config).fitted
    leaking = transform(table, fitted, keep=["row_id", "color", "y"]).where("color != 'often'").collect()
    seen = [row["x"][0] for row in leaking], [row["y"] for row in leaking]
    assert np.corrcoef(*seen)[0, 1] > 0.95
    train = table.where("_split = 'train'")
    kept = transform(train, fitted, keep=["row_id", "color", "y"], fitted_on=F.lit(True)).collect()
    alone = [row for row in kept if row["color"] != "often"]
    assert len({row["x"][0] for row in alone}) == 4, "one prior a fold"
    assert abs(np.corrcoef([r["x"][0] for r in alone], [r["y"] for r in alone])[0, 1]) < 0.3
    mean, often = np.mean(labels), labels[200:]
    row = next(row for row in transform(table, fitted, keep=["color"]).collect() if row["color"] == "often")
    assert row["x"][0] == pytest.approx((sum(often) + mean) / 201, rel=1e-6)
    unseen = spark.createDataFrame([("new",)], "color string")
    assert transform(unseen, fitted, keep=[]).first()["x"][0] == pytest.approx(mean, rel=1e-6)  # type: ignore[index]


def test_large_values_keep_their_spread(spark: SparkSession, workload: Workload) -> None:
    rows = [(1e9 + i, 0.0, "", 0, "train") for i in range(100)] + [(0.0, 0.0, "", 0, "test")]
    fitted, _ = fitted_on(spark, workload, rows, x={"columns": ["a"], "steps": ["standardize"]})
    (row,) = applied(spark, fitted, [(1e9 + 99, 0.0, "", 0)], "x")
    assert row[0] == pytest.approx(49.5 / np.std(np.arange(100)), rel=1e-5)


def test_a_constant_column_becomes_zero_and_is_named(spark: SparkSession, workload: Workload) -> None:
    rows = [(5.0, 1.0, "", 0, "train"), (5.0, 2.0, "", 1, "train"), (7.0, 2.0, "", 1, "test")]
    fitted, notes = fitted_on(spark, workload, rows, x={"columns": ["a"], "steps": ["standardize"]})
    assert applied(spark, fitted, [(5.0, 0.0, "", 0), (9.0, 0.0, "", 0)], "x") == [[0.0], [0.0]]
    assert len(notes) == 1 and "column 'a' is constant (5" in notes[0]


def test_buckets(spark: SparkSession, workload: Workload) -> None:
    steps = [{"bucketize": {"splits": [2, 5]}}]
    fitted, _ = fitted_on(spark, workload, TRAIN, x={"columns": ["a"], "steps": steps})
    got = applied(spark, fitted, [(a, None, None, 0) for a in (-9.0, 2.0, 4.9, 5.0, 1e9, None)], "x")
    assert [row[0] for row in got] == [0, 1, 1, 2, 2, 3] and fitted.inputs[0].columns[0].num_ids == 4
    rows = [(float(i), 0.0, "", 0, "train") for i in range(100)] + [(0.0, 0.0, "", 0, "test")]
    fitted, _ = fitted_on(spark, workload, rows, x={"columns": ["a"], "steps": [{"bucketize": {"quantiles": 4}}]})
    got = applied(spark, fitted, [(float(i), None, None, 0) for i in range(100)], "x")
    assert np.allclose(np.bincount([row[0] for row in got]), 25, atol=1)


def test_vocabularies_are_ordered_by_count_and_unseen_is_zero(spark: SparkSession, workload: Workload) -> None:
    fitted, _ = fitted_on(spark, workload, TRAIN, x={"columns": ["color"], "steps": ["vocabulary"]})
    assert fitted.inputs[0].columns[0].values == ("red", None, "blue")  # type: ignore[union-attr]
    got = applied(spark, fitted, [(0.0, 0.0, c, 0) for c in ("red", None, "blue", "green", "ünseen", "")], "x")
    assert [row[0] for row in got] == [1, 2, 3, 0, 0, 0]
    steps = [{"vocabulary": {"min_count": 2}}]
    fitted, _ = fitted_on(spark, workload, TRAIN, x={"columns": ["color"], "steps": steps})
    assert fitted.inputs[0].columns[0].values == ("red",)  # type: ignore[union-attr]
    steps = [{"vocabulary": {"max_size": 2}}]
    fitted, _ = fitted_on(spark, workload, TRAIN, x={"columns": ["color"], "steps": steps})
    assert fitted.inputs[0].columns[0].num_ids == 3


def test_hashes_need_no_fit(spark: SparkSession, workload: Workload) -> None:
    fitted, _ = fitted_on(spark, workload, TRAIN, x={"columns": ["color"], "steps": [{"hash": {"buckets": 7}}]})
    rows = [(0.0, float(i), f"v{i}", 0) for i in range(50)]
    got = applied(spark, fitted, rows, "x")
    assert got == applied(spark, fitted, rows, "x")
    assert {i for row in got for i in row} == set(range(7))


@pytest.mark.parametrize(
    ("rows", "inputs", "message"),
    [
        (TRAIN, {"x": {"columns": ["a"], "steps": ["standardize"]}}, "column 'a': wanted no missing values, seen 1 in"),
        (
            [(None, 1.0, "", 0, "train"), (1.0, 1.0, "", 0, "test")],
            {"x": {"columns": ["a"], "steps": ["impute_mean"]}},
            "all 1 training rows are missing",
        ),
        (
            [(1.0, 1.0, "", 2, "train"), (1.0, 1.0, "", 0, "test")],
            {"x": {"columns": ["a"]}},
            r"column 'y': wanted one of 0, 1, seen '2' \(1 rows\)",
        ),
        (
            [(1.0, 1.0, "", 1, "train"), (1.0, 1.0, "", None, "test")],
            {"x": {"columns": ["a"]}},
            "wanted one of 0, 1, seen None",
        ),
        ([(1.0, 1.0, "", 1, "train")], {"x": {"columns": ["a"]}}, "wanted rows in test, seen none"),
    ],
)
def test_rows_that_cannot_be_fitted(
    spark: SparkSession, workload: Workload, rows: list[Any], inputs: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        fitted_on(spark, workload, rows, **inputs)


def test_fitted_features_travel_as_json(spark: SparkSession, workload: Workload) -> None:
    fitted, _ = fitted_on(
        spark,
        workload,
        TRAIN,
        x={"columns": ["a", "b"], "steps": ["impute_mean", "standardize"]},
        c={"columns": ["color"], "steps": ["vocabulary"]},
        h={"columns": ["color"], "steps": [{"hash": {"buckets": 3}}]},
        q={"columns": ["a"], "steps": [{"bucketize": {"splits": [1, 2]}}]},
    )
    again = FittedFeatures.model_validate_json(fitted.model_dump_json())
    assert again == fitted and again.digest == fitted.digest
    rows = [(1.5, None, "red", 0), (None, 2.0, None, 1)]
    for name in "xchq":
        assert applied(spark, again, rows, name) == applied(spark, fitted, rows, name)


def test_splits_by_hash_stay_when_rows_arrive(
    spark: SparkSession, lake: Path, workload: Workload, rows_csv: Rows
) -> None:
    config = load_config(
        workload(rows_csv(10), split={"hash": {"by": ["color"], "shares": {"train": 0.5, "test": 0.5}}})
    )
    one = {
        r["color"]: r["_split"]
        for r in with_split(
            spark.createDataFrame([(f"c{i}", i) for i in range(400)], "color string, row_id bigint"), config
        ).collect()
    }
    more = with_split(spark.createDataFrame([(f"c{i}", -i) for i in range(800)], "color string, row_id bigint"), config)
    two = {r["color"]: r["_split"] for r in more.collect()}
    assert all(two[color] == split for color, split in one.items())
    assert 0.4 < list(two.values()).count("train") / 800 < 0.6


def codecs(snapshot: Snapshot) -> set[str]:
    group = pq.read_metadata(snapshot.paths()[0]).row_group(0)
    return {group.column(number).compression for number in range(group.num_columns)}


def test_the_tables_are_written_for_training(
    spark: SparkSession, lake: Path, workload: Workload, rows_csv: Rows
) -> None:
    path = workload(
        rows_csv(600), split={"hash": {"shares": {"train": 0.6, "test": 0.4}}, "validation": {"share": 0.2}}
    )
    layout = ("features.layout.shard_mb=0.004", "features.layout.compression=zstd")
    receipts = run(path, "ingest", "features", overrides=layout)
    total, everything = 0, set()
    for split in ("train", "validation", "test"):
        snapshot, rows = features_of(spark, receipts, split)
        assert snapshot.contract is not None and snapshot.contract.columns[0].name == "row_id"
        assert [c.name for c in snapshot.contract.columns] == ["row_id", "dense", "ids", "label"] == rows.columns
        ids = [row["row_id"] for row in rows.collect()]
        assert len(ids) == snapshot.rows and sum(ids) % 2**64 == snapshot.row_id_sum
        total += len(ids)
        everything |= set(ids)
        arrays = read_shards(shards_of(snapshot), snapshot.contract.columns)
        assert arrays["dense"].shape == (snapshot.rows, 2) and arrays["label"].dtype == np.int64
    assert total == 600 == len(everything), "each row in one split"
    snapshot, _ = features_of(spark, receipts, "train")
    assert len(snapshot.files) >= 2 and all(len(file.row_groups) == 1 for file in snapshot.files)
    assert codecs(snapshot) == {"ZSTD"}
    lines = {r["row_id"]: r["_line"] for r in spark.read.format("delta").load(str(lake / "tables/tiny/raw")).collect()}
    order = [lines[i] for path in snapshot.paths() for i in pq.read_table(path).column("row_id").to_pylist()]
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.2, "rows are pre-shuffled"


def test_the_same_rows_give_the_same_tables(
    spark: SparkSession, lake: Path, workload: Workload, rows_csv: Rows
) -> None:
    path = workload(rows_csv(200))
    first = run(path, "ingest", "features")["features"]
    (lake / "runs" / "tiny" / "features.json").unlink()
    second = run(path, "features")["features"]
    assert first.result["fitted"] == second.result["fitted"]
    for split in ("train", "test"):
        a, b = (r.result["snapshots"][split] for r in (first, second))
        assert a["row_id_sum"] == b["row_id_sum"] and b["version"] == a["version"] + 1
        assert codecs(Snapshot.model_validate(b)) == {"LZ4"}


def full_scans(spark: SparkSession, rows: int, *, since: int = 0) -> tuple[int, int]:
    """By Spark's own account: the last query, and how many reads of so many rows those behind `since` made."""
    store: Any = spark._jsparkSession.sharedState().statusStore()  # type: ignore[attr-defined]
    queries, last, found = store.executionsList(), since, 0
    for query in (queries.apply(i) for i in range(queries.size())):
        if query.executionId() <= since:
            continue
        last = max(last, query.executionId())
        values, nodes = store.executionMetrics(query.executionId()), store.planGraph(query.executionId()).allNodes()
        for node in (nodes.apply(i) for i in range(nodes.size())):
            if node.name().startswith("Scan parquet"):
                metrics = [node.metrics().apply(i) for i in range(node.metrics().size())]
                (made,) = [m.accumulatorId() for m in metrics if m.name() == "number of output rows"]
                found += values.contains(made) and values.apply(made) == str(rows)
    return last, found


@pytest.mark.parametrize(
    ("steps", "key", "wanted"),
    [
        (["impute_median", "standardize"], None, ["statistics", "values", "write"]),
        (
            ["impute_median", {"clip": {"quantiles": [0.1, 0.9]}}, "standardize"],
            "a",
            ["statistics", "statistics", "values", "write"],
        ),
    ],
)
def test_the_input_is_read_as_often_as_the_stage_says(
    spark: SparkSession,
    lake: Path,
    workload: Workload,
    rows_csv: Rows,
    steps: list[Any],
    key: str | None,
    wanted: list[str],
) -> None:
    inputs = {
        "dense": {"columns": ["a", "b"], "steps": steps},
        "ids": {"columns": ["color"], "steps": ["vocabulary"]},
        "often": {"columns": ["color"], "steps": ["frequency"]},
    }
    features = {"label": {"column": "y", "kind": "binary", "positive": [1]}, "inputs": inputs}
    path = workload(rows_csv(300), features=features)
    overrides = (f"source.key=[{key}]",) if key else ()
    run(path, "ingest", overrides=overrides)
    last, _ = full_scans(spark, 300)
    told = run(path, "features", overrides=overrides)["features"].result["input_reads"]
    assert told == wanted
    assert full_scans(spark, 300, since=last)[1] == len(wanted)


def test_two_rows_with_one_key(spark: SparkSession, lake: Path, workload: Workload) -> None:
    path = workload("".join(f"{i},{i},c{i},{i % 2}\n" for i in range(20)) + "1,2,c3,0\n")
    run(path, "ingest", overrides=("source.key=[color]",))
    with pytest.raises(DataError, match=r"wanted one row a key, seen color=c3 \(2 rows\)"):
        run(path, "features", overrides=("source.key=[color]",))


def test_vectors_and_sparse_inputs(spark: SparkSession, lake: Path, workload: Workload, tmp_path: Path) -> None:
    (tmp_path / "x.svm").write_text(
        "".join(f"{i % 2} {i % 3 + 1}:1 5:{i}.5\n" if i % 4 else f"{i % 2}\n" for i in range(1, 60))
    )
    source = {"format": "libsvm", "paths": str(tmp_path / "x.svm"), "schema": "y double, x sparse(5)"}
    features = {
        "label": {"column": "y", "kind": "binary", "positive": [1], "negative": [0]},
        "inputs": {"x": {"columns": ["x"], "steps": ["sparse"]}},
    }
    receipts = run(workload(source=source, features=features), "ingest", "features")
    snapshot, _ = features_of(spark, receipts, "train")
    assert snapshot.contract is not None
    arrays = read_shards(shards_of(snapshot), snapshot.contract.columns)
    assert arrays["x_ids"].shape == arrays["x_weights"].shape == (snapshot.rows, 2)
    empty = arrays["x_weights"].sum(axis=1) == 0
    assert empty.any() and not arrays["x_ids"][empty].any() and (arrays["x_ids"][~empty][:, 1] == 4).all()
