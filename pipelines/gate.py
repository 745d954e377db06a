"""The gate: whether a candidate may become champion. Pure: metrics in, Verdict out."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from pipelines.config.workload import LOWER_IS_BETTER, Gate

Floats = npt.NDArray[np.float64]
REPLICATES = 1000


class Check(BaseModel):
    """One rule of the gate with the wanted and the seen value."""

    model_config = ConfigDict(frozen=True)

    rule: str
    wanted: str
    seen: str
    passed: bool


class Verdict(BaseModel):
    """Passed or refused, and by which checks."""

    model_config = ConfigDict(frozen=True)

    candidate: str
    passed: bool
    checks: list[Check]

    def reasons(self) -> str:
        """The failed checks in one line."""
        return "; ".join(f"{c.rule}: wanted {c.wanted}, seen {c.seen}" for c in self.checks if not c.passed)


class Difference(BaseModel):
    """How much better the candidate is than the champion on the same rows, by a paired bootstrap.

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


def judge(gate: Gate, candidate: str, metrics: Mapping[str, float], difference: Difference | None) -> Verdict:
    """Judge a candidate's test metrics.

    Args:
        gate: The config's bounds.
        candidate: Its name.
        metrics: Its metrics on the test split.
        difference: Against the champion; None where there is none to compare with.
    """
    checks = []
    for metric, bounds in gate.require.items():
        seen = metrics.get(metric)
        if bounds.min is not None:
            passed = seen is not None and seen >= bounds.min
            checks.append(Check(rule=metric, wanted=f">= {bounds.min:g}", seen=_shown(seen), passed=passed))
        if bounds.max is not None:
            passed = seen is not None and seen <= bounds.max
            checks.append(Check(rule=metric, wanted=f"<= {bounds.max:g}", seen=_shown(seen), passed=passed))
    if difference is not None:
        seen_text = (
            f"{difference.mean:+.5f} ({difference.low:+.5f} to {difference.high:+.5f} at {difference.confidence:.0%})"
        )
        rule = f"{difference.metric} against the champion"
        checks.append(Check(rule=rule, wanted="not worse", seen=seen_text, passed=difference.high >= 0))
    return Verdict(candidate=candidate, passed=all(check.passed for check in checks), checks=checks)


def _shown(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.5f}"


def paired_bootstrap(
    metric: str, label: Floats, candidate: Floats, champion: Floats, *, confidence: float, seed: int
) -> Difference:
    """The metric's difference between two models on the same rows, resampled row by row.

    B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993, percentile interval, 1,000 replicates.

    Args:
        metric: `auc`, or a metric that is a mean over rows (rmse: the root of one).
        label: For auc, 0 or 1. Shape (rows,).
        candidate: Scores for auc, else each row's part of the mean (its loss, its hit). Shape (rows,).
        champion: The same of the champion.
        confidence: Of the two-sided interval.
        seed: Of the resampling.
    """
    rows = len(label)
    generator = np.random.default_rng(seed)
    measure_a, measure_b = _Weighted(metric, label, candidate), _Weighted(metric, label, champion)
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    differences = np.empty(REPLICATES)
    for i in range(REPLICATES):
        weights = np.bincount(generator.integers(0, rows, rows), minlength=rows).astype(np.float64)
        differences[i] = sign * (measure_a(weights) - measure_b(weights))
    tail = (1.0 - confidence) / 2.0
    low, high = np.nanquantile(differences, [tail, 1.0 - tail])
    ones = np.ones(rows)
    return Difference(
        metric=metric,
        mean=float(sign * (measure_a(ones) - measure_b(ones))),
        low=float(low),
        high=float(high),
        confidence=confidence,
        rows=rows,
    )


class _Weighted:
    """The metric as a function of the rows' weights; what does not depend on them is computed once."""

    def __init__(self, metric: str, label: Floats, values: Floats) -> None:
        self.metric, self.values = metric, values
        if metric == "auc":
            order = np.argsort(values, kind="stable")
            self.order, self.positive = order, label[order] > 0
            ordered = values[order]
            self.ends = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1)

    def __call__(self, weights: Floats) -> float:
        if self.metric != "auc":
            mean = float(np.dot(self.values, weights) / weights.sum())
            return mean**0.5 if self.metric == "rmse" else mean
        weights = weights[self.order]
        # Weight of positives and negatives in each group of equal scores; ties count half.
        positive = np.diff(np.cumsum(np.where(self.positive, weights, 0.0))[self.ends], prepend=0.0)
        negative = np.diff(np.cumsum(np.where(self.positive, 0.0, weights))[self.ends], prepend=0.0)
        below = np.cumsum(negative) - negative
        total = positive.sum() * negative.sum()
        return float(np.dot(positive, below + negative / 2.0) / total) if total else float("nan")
