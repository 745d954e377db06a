"""Each kind of label through the whole chain, on rows from which it can be learned, and served from the registry."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from pyspark.ml.regression import AFTSurvivalRegressionModel
from pyspark.sql import DataFrame, SparkSession
from sklearn import metrics as sk

from pipelines.concordance import concordance
from pipelines.config import load_config
from pipelines.errors import DataError
from pipelines.features.apply import with_label
from pipelines.features.fit import fit
from pipelines.features.fitted import FittedLabel
from pipelines.lake import LabelSpec, table_path
from pipelines.receipt import Receipt
from tests.stages import features_of, metrics_of, run

Workload = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("forked_ranks")
SPLIT = {"hash": {"shares": {"train": 0.6, "test": 0.4}}, "validation": {"share": 0.3}}
TRAIN = {"ranks": 1, "batch_size": 32, "epochs": 15, "lr": 0.02, "launcher": "torchrun"}
MLP = {"network": "mlp", "hidden": [16]}


def chain(folder: Path, workload: Workload, rows: pd.DataFrame, schema: str, **sections: Any) -> dict[str, Receipt]:
    """The receipts of all stages for rows of numbers a and b, by way of a file of one name, by which they are split."""
    rows.to_parquet(folder / "rows.parquet", index=False)
    source = {"format": "parquet", "paths": str(folder / "rows.parquet"), "schema": schema}
    return run(workload(source=source, split=SPLIT, **sections))


def features(label: dict[str, Any]) -> dict[str, Any]:
    return {"label": label, "inputs": {"dense": {"columns": ["a", "b"], "steps": ["standardize"]}}}


def labels_of(spark: SparkSession, receipts: dict[str, Receipt], split: str) -> np.ndarray:
    _, table = features_of(spark, receipts, split)
    return np.stack(table.toPandas()["label"].to_list())


def numbers(num: int = 600) -> tuple[np.random.Generator, pd.DataFrame]:
    generator = np.random.default_rng(0)
    return generator, pd.DataFrame({"a": generator.normal(size=num), "b": generator.normal(size=num)})


def assert_served_as_scored(
    spark: SparkSession, rows: pd.DataFrame, columns: Sequence[str], *, inputs: Sequence[str] = ("a", "b")
) -> None:
    """The champion says of raw rows, given to MLflow, what the score stage says."""
    raw = spark.read.format("delta").load(str(table_path("tiny", "raw")))
    scored = raw.join(spark.read.format("delta").load(str(table_path("tiny", "predictions"))), "row_id").toPandas()
    assert len(scored) == len(rows)
    served = mlflow.pyfunc.load_model("models:/tiny@champion").predict(scored[list(inputs)])
    assert list(served.columns) == list(columns)
    for name in columns:
        seen, wanted = served[name].to_list(), scored[name].to_list()
        if name == "prediction" and isinstance(wanted[0], str):
            assert seen == wanted
        elif name == "prediction" and not np.isscalar(wanted[0]):
            assert [list(row) for row in seen] == [list(row) for row in wanted]
        else:
            np.testing.assert_allclose(np.stack(seen), np.stack(wanted), rtol=1e-5)


def test_a_count(spark: SparkSession, lake: Path, workload: Workload) -> None:
    generator, rows = numbers()
    rows["y"] = generator.poisson(np.exp(0.8 * rows.a - 0.5 * rows.b + 1)).astype(np.int32)
    receipts = chain(
        lake.parent,
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
        lake.parent,
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


def test_a_survival(spark: SparkSession, lake: Path, workload: Workload) -> None:
    generator, rows = numbers()
    time = np.exp(2 + rows.a - 0.5 * rows.b + 0.5 * np.log(generator.exponential(size=len(rows))))
    ended = generator.exponential(15, len(rows))  # when nobody looked any more
    rows["t"], rows["seen"] = np.minimum(time, ended), (time <= ended).astype(np.int32)
    receipts = chain(
        lake.parent,
        workload,
        rows,
        "a double, b double, t double, seen int",
        features=features({"column": "t", "kind": "survival", "event": "seen"}),
        classic=[{"estimator": "AFTSurvivalRegression"}],
        gate={"slices": ["seen"]},
        tune={"spaces": {"AFTSurvivalRegression": {"maxIter": [20, 30]}}},
    )
    contract = features_of(spark, receipts, "train")[0].contract
    assert contract is not None and contract.label.event == "seen" and contract.columns[-1].names == ("t", "seen")
    test = labels_of(spark, receipts, "test")
    assert test.shape[1] == 2 and 0.2 < test[:, 1].mean() < 0.9
    model = AFTSurvivalRegressionModel.load(receipts["classic"].result["models"][0]["path"])
    wanted = np.array([1.0, -0.5]) * rows[["a", "b"]].std()
    assert model.coefficients.toArray() == pytest.approx(wanted.to_numpy(), abs=0.1), "those of the truth"
    assert model.scale == pytest.approx(0.5, abs=0.1)
    (candidate,) = receipts["evaluate"].result["candidates"]
    interval, found = candidate["interval"], candidate["metrics"]["concordance"]
    assert candidate["metrics"].keys() == {"concordance"} and interval["low"] < found < interval["high"]
    assert concordance(test, np.ones(len(test))) == 0.5 < 0.75 < found
    seen = [s for s in receipts["evaluate"].result["slices"] if s["value"] == "1"]
    assert seen[0]["metrics"]["concordance"] > 0.75
    assert_served_as_scored(spark, rows, ["prediction"])


def _names(receipts: dict[str, Receipt]) -> list[str]:
    return [candidate["name"] for candidate in receipts["evaluate"].result["candidates"]]


def unfit(spark: SparkSession, workload: Workload, label: dict[str, Any], values: DataFrame, **models: Any) -> str:
    """Why the features stage refuses rows of (a, y, ..., _split)."""
    schema = ", ".join(f"{name} {dtype}" for name, dtype in values.dtypes if name != "_split")
    inputs = {"dense": {"columns": ["a"], "steps": ["impute_mean"]}}
    source = {"format": "parquet", "paths": "x.parquet", "schema": schema}
    config = load_config(
        workload(
            "", source=source, features={"label": label, "inputs": inputs}, **({"classic": None, "model": MLP} | models)
        )
    )
    with pytest.raises(DataError) as refused:
        fit(values, config)
    return str(refused.value)


@pytest.mark.parametrize(
    ("label", "values", "wanted"),
    [
        ({"kind": "count"}, [(2.0, 1), (0.5, 1), (-1.0, 1), (None, 1)], [2.0, None, None, None]),
        (
            {"kind": "survival", "event": "e"},
            [(2.0, 1), (0.0, 1), (3.0, None), (3.0, 2)],
            [[2.0, 1.0], None, None, None],
        ),
    ],
)
def test_a_row_without_its_label_has_none(
    spark: SparkSession, label: dict[str, Any], values: list[Any], wanted: list[Any]
) -> None:
    """By which the rows that come to a kept transform are refused."""
    table = spark.createDataFrame([(i, *value) for i, value in enumerate(values)], "i int, y double, e int")
    fitted = FittedLabel(spec=LabelSpec(column="y", **label))
    assert [row["label"] for row in with_label(table, fitted).orderBy("i").collect()] == wanted


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            [(2.0, 1), (0.0, 1)],
            "wanted a time above 0, and 0 or 1 of 'e', in every row, seen 1 without, such as y=0.0, e=1",
        ),
        ([(2.0, 1), (2.0, 2)], "such as y=2.0, e=2"),
        ([(2.0, 1), (None, 0)], "such as y=null, e=0"),
        ([(2.0, 1), (float("inf"), None)], "such as y=Infinity, e=null"),
        ([(2.0, 0), (2.0, 1)], "wanted an event in some training row, seen none"),
    ],
)
def test_what_is_no_survival(spark: SparkSession, workload: Workload, values: list[Any], message: str) -> None:
    rows = [(1.0, *value, split) for value, split in zip(values, ("train", "test"), strict=True)]
    table = spark.createDataFrame(rows, "a double, y double, e int, _split string")
    label = {"column": "y", "kind": "survival", "event": "e"}
    assert message in unfit(spark, workload, label, table, classic=[{"estimator": "AFTSurvivalRegression"}], model=None)


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


def test_classes_are_counted_beside_vocabularies_and_keys(spark: SparkSession, workload: Workload) -> None:
    rows = [(1, "u", [2, 10, 2], "train"), (2, "v", [], "train"), (3, "u", [10], "train"), (4, "w", [7], "test")]
    table = spark.createDataFrame(rows, "row_id bigint, color string, y array<int>, _split string")
    source = {"format": "parquet", "paths": "x.parquet", "schema": "color string, y array<int>", "key": ["color"]}
    inputs = {"ids": {"columns": ["color"], "steps": ["vocabulary"]}}
    label = {"column": "y", "kind": "multilabel"}
    path = workload("", source=source, features={"label": label, "inputs": inputs}, classic=None, model=MLP)
    found = fit(table, load_config(path))
    assert found.is_unique and found.fitted.inputs[0].columns[0].values == ("u", "v")  # type: ignore[union-attr]
    assert (found.fitted.label.spec.classes, found.fitted.label.spec.counts) == (("2", "7", "10"), (1, 0, 2))
    has = with_label(table, found.fitted.label).orderBy("row_id").toPandas()["label"]
    assert [list(row) for row in has] == [[1, 0, 1], [0, 0, 0], [0, 0, 1], [0, 1, 0]]
    others = spark.createDataFrame([(1, [2, 3]), (2, None), (3, [2, None])], "i int, y array<int>")
    assert {row["label"] for row in with_label(others, found.fitted.label).collect()} == {None}


def test_lists_without_any_class(spark: SparkSession, workload: Workload) -> None:
    table = spark.createDataFrame([(1.0, [], "train"), (1.0, [], "test")], "a double, y array<int>, _split string")
    assert "wanted a class in some row, seen none" in unfit(
        spark, workload, {"column": "y", "kind": "multilabel"}, table
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, -1.0], "wanted a whole number of at least 0 in every row, seen 1 without, such as y=-1.0"),
        ([1.0, 0.5], "seen 1 without, such as y=0.5"),
        ([1.0, None], "such as y=null"),
        ([1.0, float("nan")], "seen 1 without, such as y=NaN"),
        ([1.0, float("inf")], "seen 1 without, such as y=Infinity"),
        ([0.0, 2.0], "wanted a count above 0 in some training row, seen none"),
    ],
)
def test_what_is_no_count(spark: SparkSession, workload: Workload, values: list[float | None], message: str) -> None:
    rows = [(1.0, value, split) for value, split in zip(values, ("train", "test"), strict=True)]
    table = spark.createDataFrame(rows, "a double, y double, _split string")
    assert message in unfit(spark, workload, {"column": "y", "kind": "count"}, table)


def test_what_comes_next(spark: SparkSession, lake: Path, workload: Workload) -> None:
    """Words in a circle, in texts of two to nine of them: what a row says is that of its own words, padding apart."""
    words = ["to", "be", "or", "not"]
    texts = [" ".join(words[(start + i) % 4] for i in range(num)) for start in range(4) for num in range(2, 10)] * 8
    texts[0] = "to be the"  # a word that may be in no training row
    sequence = ["tokens", {"vocabulary": {"min_count": 2}}, {"sequence": {"length": 6, "keep": "last"}}]
    receipts = chain(
        lake.parent,
        workload,
        pd.DataFrame({"a": texts}),
        "a string",
        features={
            "label": {"column": "a", "kind": "next_token"},
            "inputs": {"words": {"columns": ["a"], "steps": sequence}},
        },
        classic=[],
        model={"network": "gpt", "layers": 1, "heads": 2, "width": 16},
        train=TRAIN | {"epochs": 8, "early_stopping": {"metric": "perplexity"}},
        gate={"require": {"log_loss": {"max": 0.5}, "accuracy": {"min": 0.9}}},
    )
    contract = features_of(spark, receipts, "train")[0].contract
    assert contract is not None and [column.kind for column in contract.columns] == ["row_id", "sequence"]
    assert sorted(contract.label.classes) == sorted(["", "\ufffd", *words])
    seen = metrics_of(receipts, "gpt")
    assert seen["log_loss"] < 0.5 and seen["perplexity"] == pytest.approx(np.exp(seen["log_loss"]))
    best = receipts["train"].result["epochs"][receipts["train"].result["best_epoch"]]["metrics"]
    (candidate,) = receipts["evaluate"].result["candidates"]
    assert candidate["validation"]["log_loss"] == pytest.approx(best["validation_loss"], rel=1e-4), "as it is trained"
    assert candidate["validation"]["accuracy"] == pytest.approx(best["validation_accuracy"], rel=1e-4)
    assert candidate["validation"]["perplexity"] == pytest.approx(best["validation_perplexity"], rel=1e-4)
    assert candidate["interval"]["low"] < seen["log_loss"] < candidate["interval"]["high"]
    assert set(receipts["train"].result["sample"].split(" ")) <= set(words)
    assert_served_as_scored(
        spark, pd.DataFrame({"a": texts}), ["prediction", "probability", "log_loss", "probabilities"], inputs=["a"]
    )
    served = mlflow.pyfunc.load_model("models:/tiny@champion")
    asked = served.predict(pd.DataFrame({"a": ["to be or", "be or not to be or not to be", "to"]}))
    assert asked["prediction"].tolist() == ["not", "or", "be"]
    assert asked["log_loss"][:2].max() < 0.5 and asked["log_loss"][2] == 0
    with pytest.raises(DataError, match=r"'a': wanted two tokens in every row, .* seen 1 with fewer, such as a=alone!"):
        (lake.parent / "rows.parquet").unlink()
        pd.DataFrame({"a": [*texts, "alone!"]}).to_parquet(lake.parent / "rows.parquet", index=False)
        run(lake.parent / "tiny.yaml", "ingest", "features")
