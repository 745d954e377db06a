"""The metrics of rows that have any of several classes, as columns over `label` (0 or 1 a class) and `probabilities`."""

from collections.abc import Callable, Sequence
from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from pipelines.bootstrap import F1
from pipelines.lake.contract import HAS_CLASS

_SMALLEST = 1e-15  # a probability of 0 counts as this in the log loss, as scikit-learn does


def parts() -> dict[str, Column]:
    """Each row's part of the metrics that are means over rows, of its classes on average."""
    loss = _each_class(lambda has, share: minus_log(F.when(has == 1, share).otherwise(1.0 - share)))
    return {"hamming_loss": _sum(_each_class(_wrong)) / F.size("label"), "log_loss": _sum(loss) / F.size("label")}


def counts(metric: str) -> Column:
    """A row's hits and wrong answers as a list, for `f1_micro` over all classes, for `f1_macro` of each."""
    found = [_each_class(_hit), _each_class(_wrong)]
    return F.concat(*found) if metric == "f1_macro" else F.array(*map(_sum, found))


def pairs() -> Column:
    """For each class whether the row `has` it and the probability, its `share`."""
    return _each_class(lambda has, share: F.struct(has.alias("has"), share.alias("share")))


def f1_scores(scored: DataFrame, *, by: Sequence[str]) -> dict[tuple[Any, ...], dict[str, float]]:
    """F1 of each group, over all classes together and as the mean over the classes, 0 for a class that nowhere is.

    Args:
        scored: With `label`, `probabilities` and the columns `by`.
        by: What makes a group.
    """
    answers = _each_class(lambda has, share: F.struct(_hit(has, share).alias("hit"), _wrong(has, share).alias("wrong")))
    classes = scored.select(*by, F.posexplode(answers).alias("class", "of"))
    sums = classes.groupBy(*by, "class").agg(F.sum("of.hit").alias("hits"), F.sum("of.wrong").alias("wrong"))

    def f1(hits: Column, wrong: Column) -> Column:
        return F.coalesce(2.0 * hits / F.nullif(2.0 * hits + wrong, F.lit(0.0)), F.lit(0.0))

    micro, macro = f1(F.sum("hits"), F.sum("wrong")), F.avg(f1(F.col("hits"), F.col("wrong")))
    rows = sums.groupBy(*by).agg(micro.alias("f1_micro"), macro.alias("f1_macro")).collect()
    return {tuple(row[name] for name in by): {metric: float(row[metric]) for metric in F1} for row in rows}


def minus_log(probability: Column) -> Column:
    """The log loss of what happened with that probability."""
    bounded = F.greatest(F.least(probability, F.lit(1.0 - _SMALLEST)), F.lit(_SMALLEST))
    return F.when(probability.isNotNull(), -F.log(bounded))  # least and greatest skip nulls


def _each_class(of: Callable[[Column, Column], Column]) -> Column:
    return F.zip_with("label", "probabilities", of)


def _hit(has: Column, share: Column) -> Column:
    return ((has == 1) & (share >= HAS_CLASS)).cast("double")


def _wrong(has: Column, share: Column) -> Column:
    return ((has == 1) != (share >= HAS_CLASS)).cast("double")


def _sum(numbers: Column) -> Column:
    return F.aggregate(numbers, F.lit(0.0), lambda total, number: total + number)
