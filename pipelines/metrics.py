"""Test metrics of several models on the same rows, computed on Spark; only small summaries reach the driver.

The table has one row a model and row: `candidate, split, row_id, label, prediction, score, probabilities` and the
slice columns as strings.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pyspark.ml.evaluation import BinaryClassificationEvaluator
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from pipelines.gate import Floats
from pipelines.lake import UINT64, LabelSpec

Metrics = dict[str, float]
HISTOGRAM_BINS = 1000
MAX_SLICES = 50
PAIRED_ROWS = 50_000
_SMALLEST = 1e-15  # a probability of 0 counts as this in the log loss, as scikit-learn does


@dataclass(frozen=True)
class Measured:
    """One model on one split: its metrics, and the digest of the rows that it scored."""

    metrics: Metrics
    rows: int
    row_id_sum: int


def measure(
    scored: DataFrame, spec: LabelSpec, *, ranked: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], Measured]:
    """Metrics by (candidate, split).

    Args:
        scored: The table above.
        spec: What the label means.
        ranked: For a binary label, the (candidate, split) pairs whose AUC and PR-AUC are wanted; each costs a
            sort.
    """
    means = _means(spec)
    rows = (
        scored.groupBy("candidate", "split")
        .agg(
            F.count("*").alias("rows"),
            F.sum(F.col("row_id").cast("decimal(20,0)")).alias("row_id_sum"),
            *[column.alias(name) for name, column in means.items()],
        )
        .collect()
    )
    found = {}
    for row in rows:
        metrics = {name: float(row[name]) for name in means if row[name] is not None}
        key = (row["candidate"], row["split"])
        if spec.kind == "real":
            metrics = _from_moments(metrics)
        elif spec.kind == "binary" and key in ranked:
            metrics |= _ranking(scored.where((F.col("candidate") == key[0]) & (F.col("split") == key[1])))
        found[key] = Measured(metrics, rows=row["rows"], row_id_sum=int(row["row_id_sum"]) % UINT64)
    return found


def _means(spec: LabelSpec) -> dict[str, Column]:
    """The metrics that are means over rows."""
    if spec.kind == "real":
        error = F.col("prediction") - F.col("label")
        return {
            "squared_error": F.avg(error * error),
            "mae": F.avg(F.abs(error)),
            "variance": F.var_pop("label"),
        }
    return {
        "accuracy": F.avg((F.col("prediction") == F.col("label")).cast("double")),
        "log_loss": F.avg(row_log_loss()),
    }


def row_log_loss() -> Column:
    """-log of the probability that the model gave to the row's class; null where it gives none."""
    given = F.get("probabilities", F.col("label").cast("int"))
    bounded = F.greatest(F.least(given, F.lit(1.0 - _SMALLEST)), F.lit(_SMALLEST))
    return F.when(given.isNotNull(), -F.log(bounded))  # least and greatest skip nulls


def _from_moments(means: Metrics) -> Metrics:
    r2 = 1.0 - means["squared_error"] / means["variance"] if means["variance"] > 0 else float("nan")
    found = {"rmse": math.sqrt(means["squared_error"]), "mae": means["mae"], "r2": r2}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _ranking(rows: DataFrame) -> Metrics:
    """Exact areas under the ROC and the precision-recall curve, by MLlib's distributed sort."""
    evaluator = BinaryClassificationEvaluator(rawPredictionCol="score", labelCol="label", numBins=0)
    return {
        "auc": float(evaluator.setMetricName("areaUnderROC").evaluate(rows)),
        "pr_auc": float(evaluator.setMetricName("areaUnderPR").evaluate(rows)),
    }


def confusion(scored: DataFrame, spec: LabelSpec) -> np.ndarray[Any, Any]:
    """Counts by true and predicted class, shape (classes, classes)."""
    counts = np.zeros((len(spec.classes), len(spec.classes)), dtype=np.int64)
    for row in scored.groupBy("label", "prediction").count().collect():
        counts[int(row["label"]), int(row["prediction"])] = row["count"]
    return counts


@dataclass(frozen=True)
class Histogram:
    """Rows by score: of a binary label its score, else the probability of the predicted class.

    Attributes:
        mean: Mean score of each bin, nan where it is empty. Shape (bins,).
        positive: Rows of class 1 (else: rows predicted rightly). Shape (bins,).
        negative: The others. Shape (bins,).
    """

    mean: Floats
    positive: Floats
    negative: Floats


def histogram(scored: DataFrame, spec: LabelSpec) -> Histogram:
    """The scores in `HISTOGRAM_BINS` bins; margins go through a sigmoid first."""
    if spec.kind == "binary":
        margin = F.col("probabilities").isNull()
        score = F.when(margin, 1.0 / (1.0 + F.exp(-F.col("score")))).otherwise(F.col("score"))
        hit = F.col("label") == 1
    else:
        score = F.array_max("probabilities")
        hit = F.col("label") == F.col("prediction")
    place = F.least(F.floor(score * HISTOGRAM_BINS), F.lit(HISTOGRAM_BINS - 1)).alias("place")
    rows = (
        scored.where(score.isNotNull())
        .select(place, score.alias("score"), hit.alias("hit"))
        .groupBy("place", "hit")
        .agg(F.count("*").alias("num"), F.sum("score").alias("total"))
        .collect()
    )
    counts, totals = np.zeros((2, HISTOGRAM_BINS)), np.zeros(HISTOGRAM_BINS)
    for row in rows:
        counts[int(row["hit"]), row["place"]] += row["num"]
        totals[row["place"]] += row["total"]
    with np.errstate(invalid="ignore", divide="ignore"):
        return Histogram(mean=totals / counts.sum(axis=0), positive=counts[1], negative=counts[0])


def by_slice(scored: DataFrame, spec: LabelSpec, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Mean metrics for each value of each column, the most frequent values first."""
    found = []
    means = _means(spec)
    for column in columns:
        rows = (
            scored.groupBy(column)
            .agg(F.count("*").alias("rows"), *[value.alias(name) for name, value in means.items()])
            .orderBy(F.desc("rows"), column)
            .limit(MAX_SLICES)
            .collect()
        )
        for row in rows:
            metrics = {name: float(row[name]) for name in means if row[name] is not None}
            metrics = _from_moments(metrics) if spec.kind == "real" else metrics
            found.append({"column": column, "value": row[column], "rows": row["rows"], "metrics": metrics})
    return found


def paired_rows(scored: DataFrame, candidate: str, champion: str, metric: str) -> tuple[str, Floats, Floats, Floats]:
    """The metric that is compared, labels, and what each of two models did with the same rows.

    At most `PAIRED_ROWS` rows, so that the driver's memory does not grow.
    """
    metric = {"r2": "rmse", "pr_auc": "auc"}.get(metric, metric)
    values: Mapping[str, Column] = {
        "auc": F.col("score"),
        "accuracy": (F.col("prediction") == F.col("label")).cast("double"),
        "log_loss": row_log_loss(),
        "rmse": F.pow(F.col("prediction") - F.col("label"), 2),
        "mae": F.abs(F.col("prediction") - F.col("label")),
    }

    def of(name: str) -> DataFrame:
        chosen = scored.where(F.col("candidate") == name)
        return chosen.select(
            "row_id", F.col("label").cast("double").alias("label"), values[metric].alias(f"value_{name}")
        )

    both = of(candidate).join(of(champion).drop("label"), on="row_id", how="inner")
    label, ours, theirs = sampled(both, ["label", f"value_{candidate}", f"value_{champion}"])
    return metric, label, ours, theirs


def sampled(rows: DataFrame, columns: Sequence[str]) -> list[Floats]:
    """Some columns of at most `PAIRED_ROWS` rows, chosen by a hash of the row id. Each of shape (rows,)."""
    sample = rows.orderBy(F.xxhash64("row_id", F.lit("sample"))).limit(PAIRED_ROWS).select(*columns).toPandas()
    return [sample[name].to_numpy(dtype=np.float64) for name in columns]
