"""Test metrics of several models on the same rows, computed on Spark; only small summaries reach the driver.

The table has one row a model and row: `candidate, split, row_id, label, prediction, score, probabilities, hits` and the
slice columns as strings.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame, Row, Window
from pyspark.sql import functions as F

from pipelines import multilabel
from pipelines.arrays import one_chunk
from pipelines.bootstrap import F1, PAIRS, RANKING, Floats
from pipelines.concordance import concordance
from pipelines.lake import UINT64, LabelSpec
from pipelines.lake.contract import SMALLEST_RATE
from pipelines.multilabel import minus_log

Metrics = dict[str, float]
HISTOGRAM_BINS = 1000
MAX_SLICES = 50
PAIRED_ROWS = 50_000
RANKED_ROWS = 20_000  # of which all pairs are compared
DRAWN_PAIRS = 2_000  # rows whose pairs are kept while rows are drawn
_VARIANCE = "variance"  # of the labels


@dataclass(frozen=True)
class Measured:
    """One model on one split: its metrics, and the digest of the rows that it scored."""

    metrics: Metrics
    rows: int
    row_id_sum: int


def measure(scored: DataFrame, spec: LabelSpec) -> dict[tuple[str, str], Measured]:
    """Metrics by (candidate, split) of the table above."""
    by = ("candidate", "split")
    row_ids = F.sum(F.col("row_id").cast("decimal(20,0)")).alias("row_id_sum")
    others = _over_rows(scored, spec, by=by)
    found = {}
    for row in scored.groupBy(*by).agg(F.count("*").alias("rows"), row_ids, *_named(_means(spec))).collect():
        key = (row["candidate"], row["split"])
        metrics = _metrics(row, spec) | others.get(key, {})
        found[key] = Measured(metrics, rows=row["rows"], row_id_sum=int(row["row_id_sum"]) % UINT64)
    return found


def _named(columns: Mapping[str, Column]) -> list[Column]:
    return [column.alias(name) for name, column in columns.items()]


def _metrics(row: Row, spec: LabelSpec) -> Metrics:
    """The metrics in a row of aggregated means; what is null there, or not defined, is left out."""
    found = {name: float(row[name]) for name in _means(spec) if row[name] is not None}
    if "rmse" in found:
        found["rmse"] = math.sqrt(found["rmse"])
    if "perplexity" in found:
        found["perplexity"] = math.exp(found["perplexity"])
    variance = found.pop(_VARIANCE, 0.0)
    if "r2" in found:
        found["r2"] = 1.0 - found["r2"] / variance if variance > 0 else math.nan
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _over_rows(scored: DataFrame, spec: LabelSpec, *, by: Sequence[str]) -> dict[tuple[Any, ...], Metrics]:
    """The metrics of each group that are no means over its rows."""
    match spec.kind:
        case "binary":
            return ranking(scored, by=by)
        case "multilabel":
            return multilabel.f1_scores(scored, by=by)
        case "survival":
            return concordances(scored, by=by)
        case _:
            return {}


def ranking(scored: DataFrame, *, by: Sequence[str]) -> dict[tuple[Any, ...], Metrics]:
    """Exact areas under the ROC and the precision-recall curve of each group, and its Kolmogorov-Smirnov statistic.

    The trapezoidal rule over the distinct scores of a group, all groups in one pass; as MLlib's
    BinaryClassificationMetrics, the precision-recall curve begins at recall 0 with its first precision. `ks` is the
    widest gap between the shares of the two classes at or above a score. A group of one class is left out.

    Args:
        scored: With `label` (0 or 1), `score` and the columns `by`.
        by: What makes a group.
    """
    counts = [F.sum("label").alias("positive"), F.sum(1.0 - F.col("label")).alias("negative")]
    steps = scored.where(F.col("score").isNotNull()).groupBy(*by, "score").agg(*counts)
    falling = Window.partitionBy(*by).orderBy(F.desc("score"))
    so_far = falling.rowsBetween(Window.unboundedPreceding, Window.currentRow)
    curve = steps.withColumns({f"{name}_so_far": F.sum(name).over(so_far) for name in ("positive", "negative")})
    curve = curve.withColumn("precision", F.expr("positive_so_far / (positive_so_far + negative_so_far)"))
    curve = curve.withColumn("before", F.coalesce(F.lag("precision").over(falling), "precision"))
    group = Window.partitionBy(*by)
    positive, negative = (
        F.col(f"{name}_so_far") / F.nullif(F.sum(name).over(group), F.lit(0.0)) for name in ("positive", "negative")
    )
    curve = curve.withColumn("gap", F.abs(positive - negative))
    areas = curve.groupBy(*by).agg(
        F.expr("sum(negative * (positive_so_far - positive / 2)) / nullif(sum(positive) * sum(negative), 0)").alias(
            "auc"
        ),
        F.expr("sum(positive * (precision + before) / 2) / nullif(sum(positive), 0)").alias("pr_auc"),
        F.max("gap").alias("ks"),
    )
    return {
        tuple(row[name] for name in by): {metric: float(row[metric]) for metric in RANKING}
        for row in areas.where("auc IS NOT NULL").collect()
    }


def concordances(scored: DataFrame, *, by: Sequence[str]) -> dict[tuple[Any, ...], Metrics]:
    """The concordance index of each group, from at most `RANKED_ROWS` of its rows; a group without a pair is left out.

    Args:
        scored: With `label` (time and event), `prediction` and the columns `by`.
        by: What makes a group.
    """
    found = {}
    for group in scored.select(*by).distinct().collect():
        is_in = reduce(and_, [F.col(name).eqNullSafe(group[name]) for name in by])
        label, prediction = sampled(scored.where(is_in), ["label", "prediction"], num_rows=RANKED_ROWS)
        found[tuple(group)] = {"concordance": concordance(label, prediction)}
    return {group: metrics for group, metrics in found.items() if not math.isnan(metrics["concordance"])}


def _means(spec: LabelSpec) -> dict[str, Column]:
    """The means over rows that metrics are taken from."""
    means = {name: F.avg(part) for name, part in _parts(spec).items()}
    return means | ({_VARIANCE: F.var_pop("label")} if "r2" in means else {})


def _parts(spec: LabelSpec) -> dict[str, Column]:
    """Each row's part of the metrics that are means over rows; of `rmse` and `r2` its squared error, of `perplexity` its
    log loss.
    """
    error = F.col("prediction") - F.col("label")
    match spec.kind:
        case "real":
            return {"rmse": error * error, "mae": F.abs(error), "r2": error * error}
        case "count":
            return {"poisson_deviance": _deviance(), "rmse": error * error, "mae": F.abs(error)}
        case "multilabel":
            return multilabel.parts()
        case "next_token":
            return {"accuracy": F.col("hits"), "log_loss": F.col("score"), "perplexity": F.col("score")}
        case "survival" | "none":  # of clusters see `clusters.measure_clusters`
            return {}
        case _:
            return {"accuracy": (error == 0).cast("double"), "log_loss": _log_loss()}


def _deviance() -> Column:
    """The Poisson deviance of a row, with rates bounded from below as a model may predict 0 or less."""
    label, rate = F.col("label"), F.greatest("prediction", F.lit(SMALLEST_RATE))
    return 2.0 * (F.when(label > 0, label * F.log(label / rate)).otherwise(F.lit(0.0)) - label + rate)


def _log_loss() -> Column:
    """-log of the probability that the model gave to the row's class; null where it gives none."""
    return minus_log(F.get("probabilities", F.col("label").cast("int")))


def confusion(scored: DataFrame, spec: LabelSpec) -> np.ndarray[Any, Any]:
    """Counts by true and predicted class, shape (classes, classes)."""
    counts = np.zeros((len(spec.classes), len(spec.classes)), dtype=np.int64)
    for row in scored.groupBy("label", "prediction").count().collect():
        counts[int(row["label"]), int(row["prediction"])] = row["count"]
    return counts


@dataclass(frozen=True)
class Histogram:
    """Rows by score: of a binary label its score, of a multilabel one the probability of each class, else that of the
    predicted class.

    Attributes:
        mean: Mean score of each bin, nan where it is empty. Shape (bins,).
        positive: Rows of class 1, or of the class (else: rows predicted rightly). Shape (bins,).
        negative: The others. Shape (bins,).
    """

    mean: Floats
    positive: Floats
    negative: Floats


def histograms(scored: DataFrame, spec: LabelSpec) -> dict[str, Histogram]:
    """The scores of each candidate in `HISTOGRAM_BINS` bins; margins go through a sigmoid first."""
    if spec.kind == "binary":
        margin = F.col("probabilities").isNull()
        score = F.when(margin, 1.0 / (1.0 + F.exp(-F.col("score")))).otherwise(F.col("score"))
        hit = F.col("label") == 1
    elif spec.kind == "multilabel":
        scored = scored.select("candidate", F.explode(multilabel.pairs()).alias("of"))
        score, hit = F.col("of.share"), F.col("of.has") == 1
    else:
        score = F.array_max("probabilities")
        hit = F.col("label") == F.col("prediction")
    place = F.least(F.floor(score * HISTOGRAM_BINS), F.lit(HISTOGRAM_BINS - 1)).alias("place")
    rows = (
        scored.where(score.isNotNull())
        .select("candidate", place, score.alias("score"), hit.alias("hit"))
        .groupBy("candidate", "place", "hit")
        .agg(F.count("*").alias("num"), F.sum("score").alias("total"))
        .collect()
    )
    counts: defaultdict[str, Floats] = defaultdict(lambda: np.zeros((2, HISTOGRAM_BINS)))
    totals: defaultdict[str, Floats] = defaultdict(lambda: np.zeros(HISTOGRAM_BINS))
    for row in rows:
        counts[row["candidate"]][int(row["hit"]), row["place"]] += row["num"]
        totals[row["candidate"]][row["place"]] += row["total"]
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            name: Histogram(mean=totals[name] / both.sum(axis=0), positive=both[1], negative=both[0])
            for name, both in counts.items()
        }


def by_slice(scored: DataFrame, spec: LabelSpec, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Metrics for each value of each column, the `MAX_SLICES` most frequent values, most frequent first."""
    found = []
    for column in columns:
        sizes = scored.groupBy(column).agg(F.count("*").alias("rows"), *_named(_means(spec)))
        rows = sizes.orderBy(F.desc("rows"), column).limit(MAX_SLICES).collect()
        shown = F.col(column).isin([row[column] for row in rows if row[column] is not None]) | F.col(column).isNull()
        others = _over_rows(scored.where(shown), spec, by=[column])
        for row in rows:
            metrics = _metrics(row, spec) | others.get((row[column],), {})
            found.append({"column": column, "value": row[column], "rows": row["rows"], "metrics": metrics})
    return found


def row_values(
    scored: DataFrame, spec: LabelSpec, models: Sequence[str], metric: str
) -> tuple[Floats, dict[str, Floats]]:
    """Labels, and what each model did with the same rows, as `bootstrap.resample` takes them.

    At most `PAIRED_ROWS` rows, fewer where a row takes more memory, so that the driver's does not grow. Models that give
    no such value, as a margin has no log loss, are left out; a metric of clusters is no mean over rows, and no model has
    one.

    Args:
        scored: Rows of one split.
        spec: What the label means.
        models: The candidates wanted.
        metric: Its name.
    """
    if spec.kind == "none":
        return np.empty(0), {}
    label = F.lit(0.0) if spec.kind == "multilabel" else F.col("label")  # whose metrics do not ask for it
    fewer = {"f1_macro": PAIRED_ROWS // max(1, len(spec.classes)) + 1, "concordance": DRAWN_PAIRS}
    rows = scored.select("row_id", "candidate", label.alias("label"), _row_value(spec, metric).alias("value"))
    return paired(rows, models, num_rows=fewer.get(metric, PAIRED_ROWS))


def paired(rows: DataFrame, models: Sequence[str], *, num_rows: int = PAIRED_ROWS) -> tuple[Floats, dict[str, Floats]]:
    """The labels of a number of rows, and the value of each model for the same ones; without a model that has none.

    Args:
        rows: With `row_id`, `candidate`, `label` and `value`.
        models: The candidates wanted.
        num_rows: At most so many.
    """
    place = F.array_position(F.array(*map(F.lit, models)), F.col("candidate"))
    of_models = rows.withColumn("place", place).where("place > 0")
    columns = ["place", "label", "value"]
    places, labels, values = sampled(of_models, columns, times=len(models), num_rows=num_rows)
    of_model = {name: values[places == number] for number, name in enumerate(models, start=1)}
    found = {name: each for name, each in of_model.items() if len(each) and not np.isnan(each).any()}
    return labels[places == places.min(initial=len(models))], found


def _row_value(spec: LabelSpec, metric: str) -> Column:
    """What `bootstrap.resample` takes of a row."""
    if metric in RANKING:
        return F.col("score")
    if metric in PAIRS:
        return F.col("prediction")
    return multilabel.counts(metric) if metric in F1 else _parts(spec)[metric]


def sampled(rows: DataFrame, columns: Sequence[str], *, times: int = 1, num_rows: int = PAIRED_ROWS) -> list[Floats]:
    """Some columns of a number of rows, chosen by a hash of the row id. Each of shape (rows,), or (rows, width) of lists.

    Args:
        rows: Each row id as often as the others.
        columns: Numbers, or lists of one width.
        times: How often.
        num_rows: At most so many.
    """
    by_hash = rows.orderBy(F.xxhash64("row_id", F.lit("sample")), "row_id")
    sample = by_hash.limit(num_rows * times).select(*columns).toArrow()
    return [_as_array(one_chunk(sample[name])) for name in columns]


def _as_array(column: pa.Array) -> Floats:
    if pa.types.is_list(column.type):
        return _as_array(column.flatten()).reshape(len(column), -1)
    numbers: Floats = column.to_numpy(zero_copy_only=False).astype(np.float64)  # null is NaN
    return numbers
