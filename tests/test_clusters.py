"""Rows without a label: clusters that are there are found, measured on each split, told by names, and served."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from pyspark.ml.clustering import LDA, KMeans, LocalLDAModel
from pyspark.ml.linalg import Vectors, VectorUDT
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.types import StructType
from sklearn.metrics import silhouette_score
from sklearn.mixture import GaussianMixture

from pipelines import tracking
from pipelines.assemble import VECTOR
from pipelines.classic import fit, without_summary
from pipelines.clusters import measure_clusters, with_prediction
from pipelines.lake import table_path
from pipelines.receipt import Receipt
from tests.stages import features_of, metrics_of, run

Workload = Callable[..., Path]
SPLIT = {"hash": {"shares": {"train": 0.6, "test": 0.4}}, "validation": {"share": 0.3}}
BLOBS = [(0.0, 0.0), (20.0, 0.0), (0.0, 20.0)]
SEA = ["boat", "sail", "harbour", "wave", "tide", "anchor", "deck", "wind"]
KITCHEN = ["oven", "flour", "butter", "sugar", "dough", "bread", "yeast", "salt"]


def blobs(num: int) -> str:
    """CSV text of (a, b, color, y): the color names the blob."""
    random = np.random.default_rng(1)
    lines = []
    for i in range(num):
        a, b = random.normal(BLOBS[i % 3], 1)
        lines.append(f"{a:.4f},{b:.4f},blob{i % 3},0\n")
    return "".join(lines)


def found_by(receipts: dict[str, Receipt], name: str, tmp_path: Path) -> list[dict[str, Any]]:
    """The clusters in MLflow's JSON; the picture is beside it."""
    client, run_id = MlflowClient(tracking.tracking_uri()), receipts["classic"].run_id
    assert f"clusters/{name}.png" in {artifact.path for artifact in client.list_artifacts(run_id, "clusters")}
    path = client.download_artifacts(run_id, f"clusters/{name}.json", str(tmp_path))
    return list(json.loads(Path(path).read_text())["clusters"])


def test_blobs_are_found(
    spark: SparkSession, lake: Path, workload: Workload, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["KMeans", "BisectingKMeans", "GaussianMixture"]
    path = workload(
        blobs(300),
        split=SPLIT,
        features={"inputs": {"dense": {"columns": ["a", "b"], "steps": ["impute_mean"]}}},
        classic=[{"estimator": name, "k": 2 if name == "KMeans" else 3, "seed": 1} for name in names],
        tune={"search": "grid", "spaces": {"KMeans": {"k": [3, 6]}}},
        gate={"require": {"silhouette": {"min": 0.9}}, "slices": ["color"]},
    )
    receipts = run(path)
    assert receipts["tune"].result["best"] == {"KMeans": {"k": 3}}, "the best silhouette on validation"
    _, test = features_of(spark, receipts, "test")
    assert test.columns == ["row_id", "dense"]
    x, blob = with_blob(test)
    for name in names:
        assert metrics_of(receipts, name)["silhouette"] == pytest.approx(
            silhouette_score(x, blob, metric="sqeuclidean")
        )
    _, train = features_of(spark, receipts, "train")
    mixture = GaussianMixture(3, random_state=0, tol=1e-6).fit(with_blob(train)[0])
    likelihood = metrics_of(receipts, "GaussianMixture")["log_likelihood"]
    assert likelihood == pytest.approx(mixture.score(x), rel=1e-2), "of the test rows"
    assert metrics_of(receipts, "KMeans").keys() == {"silhouette"}
    assert receipts["evaluate"].result["candidates"][0]["interval"] is None
    assert {s["value"]: s["metrics"] for s in receipts["evaluate"].result["slices"]} == {
        f"blob{i}": {} for i in range(3)
    }
    clusters = found_by(receipts, "KMeans", tmp_path)
    assert sorted(cluster["rows"] for cluster in clusters) == sorted(np.bincount(with_blob(train)[1]))
    told = {(c["features"][0]["name"], c["features"][0]["weight"] > 0) for c in clusters}
    assert {("dense.a", True), ("dense.b", True)} <= told, "two of them are far out on one axis"
    assert "KMeans: 0 (" in capsys.readouterr().out
    scored = spark.read.format("delta").load(receipts["score"].result["table"])
    pairs = scored.join(spark.read.format("delta").load(str(table_path("tiny", "raw"))), "row_id")
    assert pairs.select("color", "prediction").distinct().count() == 3 == scored.select("prediction").distinct().count()


def with_blob(rows: DataFrame) -> tuple[Any, Any]:
    """Features of rows, and the blob of each."""
    x = np.stack(rows.toPandas()["dense"].to_list())
    return x, np.abs(x[:, None] - np.array(BLOBS)).sum(axis=2).argmin(axis=1)


def texts(num: int) -> str:
    random = np.random.default_rng(2)
    lines = [" ".join(random.choice(SEA if i % 2 else KITCHEN, 12)) + " the the" for i in range(num)]
    return "\n".join([*lines, "the rare words of nobody", "short"]) + "\n"


def test_topics_are_named_by_words_and_served(
    spark: SparkSession, lake: Path, workload: Workload, tmp_path: Path
) -> None:
    (tmp_path / "lines.txt").write_text(texts(160))
    vocabulary = {"vocabulary": {"min_count": 2, "max_share": 0.9, "max_size": 50}}
    bag = {"length": 20, "other": False}
    latent = {**bag, "weighting": "tf_idf", "unit": True}
    path = workload(
        source={
            "format": "text",
            "paths": str(tmp_path / "lines.txt"),
            "schema": "text string",
            "checks": [{"regex": {"columns": ["text"], "pattern": ".{10,}"}}],
            "max_rejected": 0.1,
        },
        split=SPLIT,
        features={
            "inputs": {
                "words": {"columns": ["text"], "steps": ["tokens", vocabulary, {"bag": bag}]},
                "latent": {
                    "columns": ["text"],
                    "steps": ["tokens", vocabulary, {"bag": latent}, {"svd": {"components": 2}}],
                },
            }
        },
        classic=[
            {"estimator": "LDA", "inputs": ["words"], "k": 2, "maxIter": 15, "subsamplingRate": 0.5},
            {"estimator": "KMeans", "inputs": ["latent"], "k": 2},
        ],
        gate={"metric": "perplexity", "require": {"perplexity": {"max": 16}}},
    )
    receipts = run(path)
    counts = receipts["ingest"].result
    assert (counts["rows_read"], counts["rows_accepted"], counts["rows_rejected"]) == (162, 161, 1)
    assert receipts["evaluate"].result["champion"] == "LDA", "the one that has the metric"
    for name in ("LDA", "KMeans"):
        metrics = metrics_of(receipts, name)
        assert metrics["silhouette"] > 0.3 and ("log_likelihood" in metrics) == (name == "LDA")
        found = [{f["name"].split(": ")[1] for f in c["features"][:6]} for c in found_by(receipts, name, tmp_path)]
        assert all(words <= {*SEA} or words <= {*KITCHEN} for words in found), found
    assert 7 < metrics_of(receipts, "LDA")["perplexity"] < 16, "of 16 words, 8 a topic"
    scored = spark.read.format("delta").load(receipts["score"].result["table"]).toPandas()
    raw = spark.read.format("delta").load(str(table_path("tiny", "raw"))).toPandas()
    wanted = raw[["row_id", "text"]].merge(scored, on="row_id")
    alone = wanted.prediction[wanted.text.str.startswith("the rare")]
    assert alone.isna().all(), "a row without a word of the vocabulary has no topic"
    served = mlflow.pyfunc.load_model("models:/tiny@champion").predict(raw[["text"]])
    assert list(served.columns) == ["prediction", "probability", "probabilities"]
    np.testing.assert_array_equal(served.prediction, wanted.prediction)
    np.testing.assert_allclose(np.stack(served.probabilities), np.stack(wanted.probabilities), atol=1e-6)


def test_topics_by_expectation_maximization_hold_no_training_rows(spark: SparkSession) -> None:
    rows = [(Vectors.dense(*(3 * [i % 2] + 3 * [1 - i % 2])),) for i in range(8)]
    table = spark.createDataFrame(rows, StructType().add(VECTOR, VectorUDT()))
    model = fit(LDA(featuresCol=VECTOR, k=2, optimizer="em", maxIter=5, seed=1), table)
    assert isinstance(model, LocalLDAModel)
    assert measure_clusters(model, table).keys() == {"silhouette", "log_likelihood", "perplexity"}
    assert with_prediction(model.transform(table)).select("prediction").distinct().count() == 2


def test_one_cluster_has_no_silhouette(spark: SparkSession) -> None:
    rows = spark.createDataFrame([(Vectors.dense(1.0, 2.0),)] * 4, StructType().add(VECTOR, VectorUDT()))
    model = KMeans(featuresCol=VECTOR, k=3).fit(rows)
    assert measure_clusters(without_summary(model), rows) == {}
