"""MLlib estimators by name, with MLlib's own results."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from pyspark.ml.classification import GBTClassificationModel, LogisticRegression, LogisticRegressionModel
from pyspark.ml.functions import vector_to_array
from pyspark.sql import SparkSession
from sklearn import linear_model as sk

from pipelines import tracking
from pipelines.assemble import assemble
from pipelines.errors import ConfigError
from pipelines.features.fitted import BUNDLE_FILE
from pipelines.tracking import ModelRef
from tests.stages import features_of, run

Workload = Callable[..., Path]
Rows = Callable[..., str]


def test_coefficients_are_plain_pysparks(spark: SparkSession, lake: Path) -> None:
    """The libsvm workload, with Spark's own reader on the same rows."""
    receipts = run("conf/libsvm.yaml", "ingest", "features", "classic")
    ref = ModelRef.model_validate(receipts["classic"].result["models"][0])
    model = LogisticRegressionModel.load(ref.path)
    assert Path(ref.path).is_relative_to(lake)
    _, rows = features_of(spark, receipts, "train")
    lines = spark.read.format("delta").load(str(lake / "tables/libsvm/raw")).select("row_id", "_line")
    wanted = {r["_line"] for r in lines.join(rows, "row_id").collect()}
    path = receipts["ingest"].result["snapshot"]["table"]
    assert path
    from pipelines.config import load_config

    source = load_config("conf/libsvm.yaml").source.paths[0]  # type: ignore[index]
    numbered = spark.read.format("libsvm").option("numFeatures", "692").load(source).coalesce(1).collect()
    plain = spark.createDataFrame([row for i, row in enumerate(numbered, 1) if i in wanted])
    reference = LogisticRegression(maxIter=10, regParam=0.01).fit(plain)
    np.testing.assert_allclose(model.coefficients.toArray(), reference.coefficients.toArray(), rtol=1e-6, atol=1e-9)
    assert model.intercept == pytest.approx(reference.intercept, rel=1e-6)


def test_a_model_loads_back_from_the_lake_and_from_mlflow(spark: SparkSession, lake: Path, tmp_path: Path) -> None:
    receipts = run("conf/libsvm.yaml", "ingest", "features", "classic")
    ref = ModelRef.model_validate(receipts["classic"].result["models"][0])
    snapshot, rows = features_of(spark, receipts, "test")
    assert snapshot.contract is not None
    assembled = assemble(rows, snapshot.contract, estimator=ref.name, keep=["row_id"])

    def probabilities(model: Any) -> list[Any]:
        scored = model.transform(assembled).orderBy("row_id")
        return [row[0] for row in scored.select(vector_to_array("probability")).collect()]

    from_lake = probabilities(LogisticRegressionModel.load(ref.path))
    assert from_lake == probabilities(tracking.load_classic(tracking.download(ref.uri, tmp_path)))
    assert (tmp_path / BUNDLE_FILE).is_file() and ref.size_bytes > 1000


ALL = [
    {"estimator": "LogisticRegression", "maxIter": 3, "lowerBoundsOnIntercepts": [-10.0]},
    {"estimator": "LinearSVC", "maxIter": 3, "inputs": ["dense"]},
    {"estimator": "DecisionTreeClassifier", "maxDepth": 2},
    {"estimator": "RandomForestClassifier", "numTrees": 3, "maxDepth": 2},
    {"estimator": "GBTClassifier", "maxIter": 30, "maxDepth": 2, "validationTol": 0.05},
    {"estimator": "NaiveBayes", "modelType": "gaussian"},
    {"estimator": "MultilayerPerceptronClassifier", "layers": [6, 4, 2], "maxIter": 5},
]
REGRESSORS = [
    {"estimator": "LinearRegression", "maxIter": 5},
    {"estimator": "DecisionTreeRegressor", "maxDepth": 3},
    {"estimator": "RandomForestRegressor", "numTrees": 3, "maxDepth": 3},
    {"estimator": "GBTRegressor", "maxIter": 3, "maxDepth": 2},
    {"estimator": "GeneralizedLinearRegression", "family": "gaussian", "link": "identity"},
    {"estimator": "FMRegressor", "factorSize": 2, "maxIter": 50, "stepSize": 0.1},
    {"estimator": "IsotonicRegression", "featureIndex": 2, "isotonic": False},
]
VALIDATED = {"hash": {"shares": {"train": 0.6, "test": 0.4}}, "validation": {"share": 0.3}}


def test_every_classifier_goes_through_the_chain(
    spark: SparkSession, lake: Path, workload: Workload, rows_csv: Rows, tmp_path: Path
) -> None:
    receipts = run(workload(rows_csv(400), classic=ALL, split=VALIDATED))
    candidates = receipts["evaluate"].result["candidates"]
    assert [c["name"] for c in candidates] == [e["estimator"] for e in ALL]
    for candidate in candidates:
        metrics = candidate["metrics"]
        assert candidate["kind"] == "classic" and candidate["rows"] == receipts["evaluate"].result["rows"]["test"]
        assert 0.6 < metrics["accuracy"] <= 1 and 0.5 < metrics["auc"] <= 1 and 0.3 < metrics["pr_auc"] <= 1
        assert ("log_loss" in metrics) == (candidate["name"] != "LinearSVC"), "an SVM has no probabilities"
        interval = candidate["interval"]
        assert interval["low"] <= metrics["auc"] <= interval["high"] and candidate["rows_per_s"] > 0
    boosted = next(m["path"] for m in receipts["classic"].result["models"] if m["name"] == "GBTClassifier")
    assert GBTClassificationModel.load(boosted).getNumTrees < 30, "it stopped on the validation split"
    kept = MlflowClient(tracking.tracking_uri())
    found = {a.path for a in kept.list_artifacts(receipts["classic"].run_id, "importances")}
    for name in ("LinearSVC", "LogisticRegression", "GBTClassifier"):
        assert f"importances/{name}.png" in found
        path = kept.download_artifacts(receipts["classic"].run_id, f"importances/{name}.json", str(tmp_path))
        features = {f["name"]: f["weight"] for f in json.loads(Path(path).read_text())["features"]}
        assert features["dense.a"] > 0
        assert features.keys() == {"dense.a", "dense.b"} or name != "LinearSVC", "it reads one input"
    assert features.keys() == {"dense.a", "dense.b", "ids.color"} and sum(features.values()) == pytest.approx(1)
    assert "importances/NaiveBayes.json" not in found


def test_every_regressor_goes_through_the_chain(
    spark: SparkSession, lake: Path, workload: Workload, rows_csv: Rows
) -> None:
    features = {
        "label": {"column": "b", "kind": "real"},
        "inputs": {
            "dense": {"columns": ["a"], "steps": ["standardize"]},
            "ids": {"columns": ["y"], "steps": ["vocabulary"]},
        },
    }
    receipts = run(workload(rows_csv(400), classic=REGRESSORS, split=VALIDATED, features=features))
    for candidate in receipts["evaluate"].result["candidates"]:
        metrics = candidate["metrics"]
        least = 0.1 if candidate["name"] == "IsotonicRegression" else 0.2  # of one feature
        assert set(metrics) == {"rmse", "mae", "r2"} and metrics["mae"] < metrics["rmse"] < 1.2
        assert metrics["r2"] > least, candidate["name"]
    assert receipts["score"].rows == 400


def test_several_classes_of_which_each_is_told_from_the_rest(
    spark: SparkSession, lake: Path, workload: Workload, rows_csv: Rows
) -> None:
    features = {
        "label": {"column": "color", "kind": "multiclass"},
        "inputs": {"dense": {"columns": ["a", "b"], "steps": ["impute_mean"]}},
    }
    boosted = {"estimator": "GBTClassifier", "maxIter": 3, "maxDepth": 2}
    path = workload(rows_csv(300), classic=[boosted], features=features, class_weights={"red": 50})
    receipts = run(path)
    assert receipts["evaluate"].result["candidates"][0]["metrics"].keys() == {"accuracy"}, "and no probabilities"
    shown = spark.read.format("delta").load(receipts["score"].result["table"]).groupBy("prediction").count().collect()
    assert max(shown, key=lambda row: row["count"])["prediction"] == "red", "which weighs most"


def test_balanced_classes_are_scikit_learns(
    spark: SparkSession, lake: Path, workload: Workload, rows_csv: Rows
) -> None:
    classic = [{"estimator": "LogisticRegression", "tol": 1e-9, "maxIter": 200}]
    features = {
        "label": {"column": "y", "kind": "binary", "positive": [1]},
        "inputs": {"dense": {"columns": ["a", "b"], "steps": ["impute_mean"]}},
    }
    path = workload(rows_csv(300), classic=classic, features=features, class_weights="balanced")
    receipts = run(path, "ingest", "features", "classic")
    _, rows = features_of(spark, receipts, "train")
    table = rows.toPandas()
    reference = sk.LogisticRegression(C=np.inf, class_weight="balanced", tol=1e-9, max_iter=1000)
    reference.fit(np.stack(table["dense"].to_list()), table["label"])
    model = LogisticRegressionModel.load(receipts["classic"].result["models"][0]["path"])
    np.testing.assert_allclose(model.coefficients.toArray(), reference.coef_[0], rtol=1e-3)


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        ({"estimator": "LogisticRegression", "maxIter": "many"}, "LogisticRegression: .*maxIter"),
        ({"estimator": "LogisticRegression", "regParam": -1.0}, "LogisticRegression: MLlib refuses: .*regParam"),
        ({"estimator": "NaiveBayes"}, "NaiveBayes: MLlib refuses: .*Negative"),
        (
            {"estimator": "MultilayerPerceptronClassifier", "layers": [3, 2]},
            "layers: wanted 6 inputs first and 2 classes last",
        ),
    ],
)
def test_what_mllib_refuses_is_a_config_error(
    spark: SparkSession, lake: Path, workload: Workload, rows_csv: Rows, estimator: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(workload(rows_csv(100), classic=[estimator]), "ingest", "features", "classic")
