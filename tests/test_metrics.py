"""Metrics computed on Spark are scikit-learn's."""

import numpy as np
import pytest
from pyspark.sql import DataFrame, SparkSession
from scipy.stats import ks_2samp
from sklearn import metrics as sk

from pipelines.bootstrap import resample
from pipelines.lake import LabelSpec
from pipelines.lake.contract import SMALLEST_RATE
from pipelines.metrics import by_slice, confusion, histograms, measure, row_values

BINARY = LabelSpec(kind="binary", column="y", classes=("0", "1"))
MULTI = LabelSpec(kind="multiclass", column="y", classes=("a", "b", "c"))
REAL = LabelSpec(kind="real", column="y")
COUNT = LabelSpec(kind="count", column="y")
MULTILABEL = LabelSpec(kind="multilabel", column="y", classes=("a", "b", "c", "nowhere"))
SCHEMA = (
    "candidate string, split string, row_id bigint, slice_s string, label double, prediction double, score double, "
    "probabilities array<double>"
)


@pytest.fixture(scope="module")
def binary(spark: SparkSession) -> tuple[DataFrame, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    label = (generator.random(3000) < 0.3).astype(float)
    score = np.clip(np.round(0.3 * label + generator.random(3000) * 0.7, 2), 0.0, 1.0)  # ties, 0 and 1 among them
    rows = [
        (
            name,
            "test",
            int(i),
            "even" if i % 2 == 0 else None,
            float(y),
            float(s > 0.5),
            float(s),
            [1 - float(s), float(s)],
        )
        for name, scores in (("m", score), ("n", score[::-1]))
        for i, (y, s) in enumerate(zip(label, scores, strict=True))
    ]
    return spark.createDataFrame(rows, SCHEMA), label, score


def test_binary(binary: tuple[DataFrame, np.ndarray, np.ndarray]) -> None:
    rows, label, score = binary
    measured = measure(rows, BINARY)
    seen = measured["m", "test"]
    assert (seen.rows, seen.row_id_sum) == (3000, sum(range(3000)))
    assert seen.metrics["accuracy"] == pytest.approx(np.mean((score > 0.5) == label))
    assert seen.metrics["log_loss"] == pytest.approx(sk.log_loss(label, score), rel=1e-3)
    assert seen.metrics["auc"] == pytest.approx(sk.roc_auc_score(label, score), abs=1e-12)
    precision, recall, _ = sk.precision_recall_curve(label, score)
    assert seen.metrics["pr_auc"] == pytest.approx(sk.auc(recall, precision), abs=2e-3)
    assert seen.metrics["ks"] == pytest.approx(ks_2samp(score[label > 0], score[label == 0]).statistic)
    assert measured["n", "test"].metrics["auc"] == pytest.approx(sk.roc_auc_score(label, score[::-1]), abs=1e-12)


def test_no_probabilities_no_log_loss(spark: SparkSession) -> None:
    rows = [("svc", "test", i, None, float(i % 2), float(i % 2), i - 5.0, None) for i in range(10)]
    table = spark.createDataFrame(rows, SCHEMA)
    metrics = measure(table, BINARY)["svc", "test"].metrics
    assert set(metrics) == {"accuracy", "auc", "pr_auc", "ks"}
    counts = histograms(table, BINARY)["svc"]
    assert counts.positive.sum() == counts.negative.sum() == 5


def test_multiclass(spark: SparkSession) -> None:
    generator = np.random.default_rng(1)
    probabilities = generator.dirichlet([1, 1, 1], 500)
    label = generator.integers(0, 3, 500)
    rows = [
        ("m", "test", i, None, float(y), float(p.argmax()), None, p.tolist())
        for i, (y, p) in enumerate(zip(label, probabilities, strict=True))
    ]
    table = spark.createDataFrame(rows, SCHEMA)
    metrics = measure(table, MULTI)["m", "test"].metrics
    assert metrics["accuracy"] == pytest.approx(sk.accuracy_score(label, probabilities.argmax(1)))
    assert metrics["log_loss"] == pytest.approx(sk.log_loss(label, probabilities))
    np.testing.assert_array_equal(confusion(table, MULTI), sk.confusion_matrix(label, probabilities.argmax(1)))
    counts = histograms(table, MULTI)["m"]
    assert counts.positive.sum() == (label == probabilities.argmax(1)).sum()


def test_real(spark: SparkSession) -> None:
    generator = np.random.default_rng(2)
    label = generator.normal(1e5, 1e4, 400)
    prediction = label + generator.normal(0, 3e3, 400)
    rows = [
        ("m", "test", i, None, float(y), float(p), None, None)
        for i, (y, p) in enumerate(zip(label, prediction, strict=True))
    ]
    metrics = measure(spark.createDataFrame(rows, SCHEMA), REAL)["m", "test"].metrics
    assert metrics["rmse"] == pytest.approx(sk.root_mean_squared_error(label, prediction))
    assert metrics["mae"] == pytest.approx(sk.mean_absolute_error(label, prediction))
    assert metrics["r2"] == pytest.approx(sk.r2_score(label, prediction))


def test_count(spark: SparkSession) -> None:
    generator = np.random.default_rng(2)
    label = generator.poisson(1.5, 400)
    prediction = np.where(np.arange(400) % 40 == 0, -0.5, label * 0.5 + generator.gamma(2, 0.5, 400))
    rows = [
        ("m", "test", i, None, float(y), float(p), None, None)
        for i, (y, p) in enumerate(zip(label, prediction, strict=True))
    ]
    table = spark.createDataFrame(rows, SCHEMA)
    metrics = measure(table, COUNT)["m", "test"].metrics
    wanted = sk.mean_poisson_deviance(label, np.maximum(prediction, SMALLEST_RATE))
    assert metrics["poisson_deviance"] == pytest.approx(wanted) and metrics.keys() == {
        "poisson_deviance",
        "rmse",
        "mae",
    }
    assert metrics["rmse"] == pytest.approx(sk.root_mean_squared_error(label, prediction))
    assert row_values(table, COUNT, ["m"], "poisson_deviance")[1]["m"].mean() == pytest.approx(wanted)


def test_multilabel(spark: SparkSession) -> None:
    generator = np.random.default_rng(3)
    has = generator.random((300, 4)) < [0.5, 0.2, 0.05, 0.0]
    shares = np.clip(np.round(0.4 * has + generator.random((300, 4)) * [0.7, 0.7, 0.7, 0.4], 2), 0.0, 1.0)
    rows = [
        ("m", "test", i, "even" if i % 2 == 0 else None, y, None, None, p)
        for i, (y, p) in enumerate(zip(has.astype(float).tolist(), shares.tolist(), strict=True))
    ]
    table = spark.createDataFrame(rows, SCHEMA.replace("label double", "label array<double>"))
    wanted = {
        "f1_micro": sk.f1_score(has, shares >= 0.5, average="micro"),
        "f1_macro": sk.f1_score(has, shares >= 0.5, average="macro", zero_division=0),
        "hamming_loss": sk.hamming_loss(has, shares >= 0.5),
        "log_loss": np.mean([sk.log_loss(y, p, labels=[False, True]) for y, p in zip(has, shares, strict=True)]),
    }
    assert measure(table, MULTILABEL)["m", "test"].metrics == pytest.approx(wanted, rel=1e-9)
    even = next(s for s in by_slice(table, MULTILABEL, ["slice_s"]) if s["value"] == "even")
    assert even["metrics"]["f1_macro"] == pytest.approx(
        sk.f1_score(has[::2], shares[::2] >= 0.5, average="macro", zero_division=0)
    )
    for metric, value in wanted.items():
        drawn = resample(metric, *row_values(table, MULTILABEL, ["m"], metric), seed=0)
        interval = drawn.interval("m", confidence=0.95)
        assert drawn.values["m"][0] == pytest.approx(value) and interval.low < value < interval.high
    counts = histograms(table, MULTILABEL)["m"]
    assert counts.positive.sum() == has.sum() and counts.positive.sum() + counts.negative.sum() == has.size


def test_slices(binary: tuple[DataFrame, np.ndarray, np.ndarray]) -> None:
    rows, label, score = binary
    slices = by_slice(rows.where("candidate = 'm'"), BINARY, ["slice_s"])
    assert {(s["value"], s["rows"]) for s in slices} == {("even", 1500), (None, 1500)}
    even = next(s for s in slices if s["value"] == "even")
    assert even["metrics"]["accuracy"] == pytest.approx(np.mean((score > 0.5)[::2] == label[::2]))
    assert even["metrics"]["auc"] == pytest.approx(sk.roc_auc_score(label[::2], score[::2]), abs=1e-12)


def test_models_are_compared_on_the_same_rows(binary: tuple[DataFrame, np.ndarray, np.ndarray]) -> None:
    rows, label, score = binary
    labels, values = row_values(rows, BINARY, ["m", "n"], "auc")
    assert len(labels) == 3000
    assert sk.roc_auc_score(labels, values["m"]) == pytest.approx(sk.roc_auc_score(label, score))
    assert sk.roc_auc_score(labels, values["n"]) == pytest.approx(sk.roc_auc_score(label, score[::-1]))


def test_a_model_without_the_metric_is_left_out(spark: SparkSession) -> None:
    svc = [("svc", "test", i, None, float(i % 2), float(i % 2), i - 5.0, None) for i in range(10)]
    other = [("lr", "test", i, None, float(i % 2), float(i % 2), 0.5, [0.5, 0.5]) for i in range(10)]
    labels, values = row_values(spark.createDataFrame([*svc, *other], SCHEMA), BINARY, ["svc", "lr"], "log_loss")
    assert len(labels) == 10 and values.keys() == {"lr"}
    np.testing.assert_allclose(values["lr"], np.log(2))


def test_one_class_has_no_areas(spark: SparkSession) -> None:
    rows = [("m", "test", i, None, 1.0, 1.0, i / 10, [1 - i / 10, i / 10]) for i in range(1, 9)]
    assert set(measure(spark.createDataFrame(rows, SCHEMA), BINARY)["m", "test"].metrics) == {"accuracy", "log_loss"}
