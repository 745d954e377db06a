"""Each kind of label through the whole chain, on rows from which it can be learned, and served from the registry."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from pyspark.sql import DataFrame, SparkSession
from sklearn import metrics as sk

from pipelines.config import load_config
from pipelines.errors import DataError
from pipelines.features.fit import fit
from pipelines.lake import table_path
from pipelines.receipt import Receipt
from tests.stages import features_of, metrics_of, run

Workload = Callable[..., Path]
SPLIT = {"hash": {"shares": {"train": 0.6, "test": 0.4}}, "validation": {"share": 0.3}}
TRAIN = {"ranks": 1, "batch_size": 32, "epochs": 15, "lr": 0.02, "launcher": "torchrun"}
MLP = {"network": "mlp", "hidden": [16]}


def chain(
    spark: SparkSession, workload: Workload, rows: pd.DataFrame, schema: str, **sections: Any
) -> dict[str, Receipt]:
    """The receipts of all stages for rows of numbers a and b."""
    path = workload("", split=SPLIT, **sections)
    folder = path.parent / "raw" / "table"
    spark.createDataFrame(rows, schema).coalesce(2).write.mode("overwrite").parquet(str(folder))
    return run(path, overrides=(f"source={{format: parquet, paths: {folder}, schema: '{schema}'}}",))


def features(label: dict[str, Any]) -> dict[str, Any]:
    return {"label": label, "inputs": {"dense": {"columns": ["a", "b"], "steps": ["standardize"]}}}


def labels_of(spark: SparkSession, receipts: dict[str, Receipt], split: str) -> np.ndarray:
    _, table = features_of(spark, receipts, split)
    return np.stack(table.toPandas()["label"].to_list())


def numbers(num: int = 600) -> tuple[np.random.Generator, pd.DataFrame]:
    generator = np.random.default_rng(0)
    return generator, pd.DataFrame({"a": generator.normal(size=num), "b": generator.normal(size=num)})


def assert_served_as_scored(spark: SparkSession, rows: pd.DataFrame, columns: Sequence[str]) -> None:
    """The champion says of raw rows, given to MLflow, what the score stage says."""
    raw = spark.read.format("delta").load(str(table_path("tiny", "raw")))
    scored = raw.join(spark.read.format("delta").load(str(table_path("tiny", "predictions"))), "row_id").toPandas()
    assert len(scored) == len(rows)
    served = mlflow.pyfunc.load_model("models:/tiny@champion").predict(scored[["a", "b"]])
    assert list(served.columns) == list(columns)
    for name in columns:
        seen, wanted = served[name].to_list(), scored[name].to_list()
        if name == "prediction" and not np.isscalar(wanted[0]):
            assert [list(row) for row in seen] == [list(row) for row in wanted]
        else:
            np.testing.assert_allclose(np.stack(seen), np.stack(wanted), rtol=1e-5)


def test_a_count(spark: SparkSession, lake: Path, workload: Workload) -> None:
    generator, rows = numbers()
    rows["y"] = generator.poisson(np.exp(0.8 * rows.a - 0.5 * rows.b + 1)).astype(np.int32)
    receipts = chain(
        spark,
        workload,
        rows,
        "a double, b double, y int",
        features=features({"column": "y", "kind": "count"}),
        classic=[{"estimator": "GeneralizedLinearRegression"}, {"estimator": "LinearRegression"}],
        model=MLP,
        train=TRAIN | {"early_stopping": {"metric": "poisson_deviance"}},
    )
    spec = features_of(spark, receipts, "train")[0].contract.label  # type: ignore[union-attr]
    train, test = labels_of(spark, receipts, "train"), labels_of(spark, receipts, "test")
    assert spec.kind == "count" and spec.mean == pytest.approx(train.mean()) and train.dtype == np.float64
    constant = sk.mean_poisson_deviance(test, np.full(len(test), train.mean()))
    deviance = {name: metrics_of(receipts, name)["poisson_deviance"] for name in _names(receipts)}
    assert set(metrics_of(receipts, "mlp")) == {"poisson_deviance", "rmse", "mae"}
    assert deviance["GeneralizedLinearRegression"] < deviance["mlp"] < constant / 2, (
        "a Poisson's, unless told otherwise"
    )
    assert deviance["GeneralizedLinearRegression"] < deviance["LinearRegression"]
    for candidate in receipts["evaluate"].result["candidates"]:
        interval = candidate["interval"]
        assert interval["low"] < candidate["metrics"]["poisson_deviance"] < interval["high"]
    assert receipts["evaluate"].result["champion"] == "GeneralizedLinearRegression"
    assert_served_as_scored(spark, rows, ["prediction"])


def test_several_classes_a_row(spark: SparkSession, lake: Path, workload: Workload) -> None:
    _, rows = numbers()
    has = {"calm": -rows.a, "left": rows.a + rows.b - 0.5, "up": rows.b}
    rows["y"] = [[name for name in ("up", "calm", "left") if has[name][i] > 0] for i in range(len(rows))]
    receipts = chain(
        spark,
        workload,
        rows,
        "a double, b double, y array<string>",
        features=features({"column": "y", "kind": "multilabel"}),
        classic=None,
        model=MLP,
        train=TRAIN | {"early_stopping": {"metric": "f1_micro"}},
    )
    contract = features_of(spark, receipts, "train")[0].contract
    assert contract is not None and contract.label.classes == ("calm", "left", "up")
    train, test = labels_of(spark, receipts, "train"), labels_of(spark, receipts, "test")
    assert train.shape[1] == 3 and train.dtype == np.int8 and contract.label.counts == tuple(train.sum(axis=0))
    metrics = metrics_of(receipts, "mlp")
    constant = np.tile(train.mean(axis=0) >= 0.5, (len(test), 1))
    assert metrics["f1_micro"] > 0.9 > sk.f1_score(test, constant, average="micro") + 0.2
    assert metrics["hamming_loss"] < 0.1 and metrics["log_loss"] < 0.3 and metrics["f1_macro"] > 0.9
    epoch = receipts["train"].result["epochs"][-1]["metrics"]
    assert {"hamming_loss", "validation_f1_micro", "validation_log_loss"} <= epoch.keys()
    assert_served_as_scored(spark, rows, ["prediction", "probabilities"])
    table = spark.read.format("delta").load(str(table_path("tiny", "predictions")))
    assert table.where("array_contains(prediction, 'up') != (probabilities[2] >= 0.5)").count() == 0


def _names(receipts: dict[str, Receipt]) -> list[str]:
    return [candidate["name"] for candidate in receipts["evaluate"].result["candidates"]]


def unfit(spark: SparkSession, workload: Workload, label: dict[str, Any], values: DataFrame) -> str:
    """Why the features stage refuses rows of (a, y, ..., _split)."""
    schema = ", ".join(f"{name} {dtype}" for name, dtype in values.dtypes if name != "_split")
    inputs = {"dense": {"columns": ["a"], "steps": ["impute_mean"]}}
    source = {"format": "parquet", "paths": "x.parquet", "schema": schema}
    config = load_config(
        workload("", source=source, features={"label": label, "inputs": inputs}, classic=None, model=MLP)
    )
    with pytest.raises(DataError) as refused:
        fit(values, config)
    return str(refused.value)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([["x"], None], "wanted one of x, y, seen None (1 rows)"),
        ([["x"], ["y", None]], "seen None (1 rows)"),
        ([["x"], ["z", "z"]], "seen 'z' (1 rows); mend rows or classes"),
    ],
)
def test_classes_outside_those_of_the_config(
    spark: SparkSession, workload: Workload, lists: list[list[str] | None], message: str
) -> None:
    rows = [(1.0, values, split) for values, split in zip(lists, ("train", "test"), strict=True)]
    table = spark.createDataFrame(rows, "a double, y array<string>, _split string")
    assert message in unfit(spark, workload, {"column": "y", "kind": "multilabel", "classes": ["x", "y"]}, table)


def test_lists_without_any_class(spark: SparkSession, workload: Workload) -> None:
    table = spark.createDataFrame([(1.0, [], "train"), (1.0, [], "test")], "a double, y array<int>, _split string")
    assert "wanted a class in some row, seen none" in unfit(
        spark, workload, {"column": "y", "kind": "multilabel"}, table
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, -1.0], "wanted a whole number of at least 0 in every row, seen 1 without, such as -1"),
        ([1.0, 0.5], "seen 1 without, such as 0.5"),
        ([1.0, None], "seen 1 missing"),
        ([1.0, float("nan")], "seen 1 without, such as nan"),
        ([1.0, float("inf")], "seen 1 without, such as inf"),
        ([0.0, 2.0], "wanted a count above 0 in some training row, seen none"),
    ],
)
def test_what_is_no_count(spark: SparkSession, workload: Workload, values: list[float | None], message: str) -> None:
    rows = [(1.0, value, split) for value, split in zip(values, ("train", "test"), strict=True)]
    table = spark.createDataFrame(rows, "a double, y double, _split string")
    assert message in unfit(spark, workload, {"column": "y", "kind": "count"}, table)
