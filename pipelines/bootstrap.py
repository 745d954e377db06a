"""How sure a metric is: the same draws of the same rows for every model. Pure: arrays in, intervals out.

B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993: rows drawn with replacement, percentile intervals.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from pipelines.concordance import comparable, in_order
from pipelines.config.workload import LOWER_IS_BETTER

Floats = npt.NDArray[np.float64]
REPLICATES = 1000
F1 = ("f1_micro", "f1_macro")  # made of counts over rows, of a row's hits and wrong answers: of all classes, of each
PAIRS = ("concordance",)  # made of pairs of rows
RANKING = ("auc", "pr_auc", "ks")  # metrics that depend on the order of the scores alone


class Interval(BaseModel):
    """Where a metric lies with some confidence, two-sided.

    Attributes:
        rows: How many were drawn from.
    """

    model_config = ConfigDict(frozen=True)

    low: float
    high: float
    confidence: float
    rows: int


class Difference(BaseModel):
    """How much better the candidate is than the champion on the same rows.

    Attributes:
        mean: Candidate minus champion, turned so that above 0 is better.
        low: Lower bound of the two-sided interval.
        high: Upper bound.
    """

    model_config = ConfigDict(frozen=True)

    metric: str
    mean: float
    low: float
    high: float
    confidence: float
    rows: int


@dataclass(frozen=True)
class Resampled:
    """A metric of each model: first on all rows, then on each of `REPLICATES` draws, shape (1 + REPLICATES,)."""

    metric: str
    rows: int
    values: Mapping[str, Floats]

    def interval(self, model: str, *, confidence: float) -> Interval:
        """Of the model's metric."""
        low, high = _bounds(self.values[model][1:], confidence)
        return Interval(low=low, high=high, confidence=confidence, rows=self.rows)

    def difference(self, candidate: str, champion: str, *, confidence: float) -> Difference:
        """Of the two models' metric, drawn in pairs."""
        sign = -1.0 if self.metric in LOWER_IS_BETTER else 1.0
        better = sign * (self.values[candidate] - self.values[champion])
        low, high = _bounds(better[1:], confidence)
        mean = float(better[0])
        return Difference(metric=self.metric, mean=mean, low=low, high=high, confidence=confidence, rows=self.rows)


def resample(metric: str, label: Floats, models: Mapping[str, Floats], *, seed: int) -> Resampled:
    """The metric of several models on draws of the rows; models for which it is not defined are left out.

    Args:
        metric: Its name.
        label: For metrics of an order, 0 or 1. Shape (rows,). For those of pairs, time and event. Shape (rows, 2).
        models: For metrics of an order each row's score, of pairs its prediction, else its part of the mean (its loss,
            its hit; for `rmse` and `r2` its squared error, for `perplexity` its loss). Each of shape (rows,). For F1 its
            counts, the hits and then the wrong answers. Each of shape (rows, 2) or (rows, 2 * classes).
        seed: Of the draws.
    """
    rows = len(label)
    generator = np.random.default_rng(seed)
    measures = {name: _Weighted(metric, label, values) for name, values in models.items()}
    found = {name: np.empty(1 + REPLICATES) for name in models}
    for i in range(1 + REPLICATES) if models else ():
        draw = generator.integers(0, rows, rows) if i else np.arange(rows)
        weights = np.bincount(draw, minlength=rows).astype(np.float64)
        for name, measure in measures.items():
            found[name][i] = measure(weights)
    return Resampled(metric, rows, {name: values for name, values in found.items() if not np.isnan(values[0])})


def f1_score(hits: Floats, wrong: Floats) -> float:
    """Mean over classes of 2 hits / (2 hits + wrong), where a hit is a true positive, and 0 for a class with neither."""
    hits, wrong = np.atleast_1d(hits), np.atleast_1d(wrong)
    return float(np.divide(2 * hits, 2 * hits + wrong, out=np.zeros(len(hits)), where=hits + wrong > 0).mean())


def _bounds(values: Floats, confidence: float) -> tuple[float, float]:
    tail = (1.0 - confidence) / 2.0
    low, high = np.nanquantile(values, [tail, 1.0 - tail])
    return float(low), float(high)


class _Weighted:
    """The metric as a function of the rows' weights; what does not depend on them is computed once."""

    def __init__(self, metric: str, label: Floats, values: Floats) -> None:
        self.metric, self.label, self.values = metric, label, values
        if metric in RANKING:
            self.order = np.argsort(-values, kind="stable")
            self.positive = label[self.order] > 0
            falling = values[self.order]
            self.ends = np.append(np.flatnonzero(falling[1:] != falling[:-1]), len(falling) - 1)

        if metric in PAIRS:
            self.pairs = comparable(label, label).astype(np.float64)
            self.won = self.pairs * in_order(values, values)

    def __call__(self, weights: Floats) -> float:
        if self.metric in RANKING:
            return self._of_order(weights[self.order])
        if self.metric in PAIRS:
            pairs = float(weights @ self.pairs @ weights)
            return float(weights @ self.won @ weights) / pairs if pairs else float("nan")
        if self.metric in F1:
            return f1_score(*np.split(weights @ self.values, 2))
        mean = float(np.dot(self.values, weights) / weights.sum())
        if self.metric == "r2":
            away = self.label - np.dot(self.label, weights) / weights.sum()
            variance = float(np.dot(away * away, weights) / weights.sum())
            return 1.0 - mean / variance if variance else float("nan")
        if self.metric == "perplexity":
            return float(np.exp(mean))
        return mean**0.5 if self.metric == "rmse" else mean

    def _of_order(self, weights: Floats) -> float:
        """By the weight of positives and negatives down to each distinct score, from the highest; ties count half."""
        positive = np.cumsum(np.where(self.positive, weights, 0.0))[self.ends]
        negative = np.cumsum(np.where(self.positive, 0.0, weights))[self.ends]
        if not (positive[-1] and negative[-1]):
            return float("nan")
        if self.metric == "ks":
            return float(np.abs(positive / positive[-1] - negative / negative[-1]).max())
        drawn = np.flatnonzero(positive + negative)  # not before the first row that was drawn
        gained = np.diff(positive, prepend=0.0)
        if self.metric == "auc":
            return float(
                np.dot(np.diff(negative, prepend=0.0), positive - gained / 2.0) / (positive[-1] * negative[-1])
            )
        precision = (positive / np.maximum(positive + negative, 1.0))[drawn]
        before = np.append(precision[:1], precision[:-1])
        return float(np.dot(gained[drawn], precision + before) / 2.0 / positive[-1])
