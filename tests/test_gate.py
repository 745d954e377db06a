"""The gate passes and refuses by its bounds, and knows a difference from noise."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from pipelines.config.workload import Gate
from pipelines.gate import Difference, _Weighted, judge, paired_bootstrap

GATE = Gate.model_validate({"require": {"auc": {"min": 0.9}, "log_loss": {"max": 0.3}}})


def test_bounds() -> None:
    assert judge(GATE, "m", {"auc": 0.9, "log_loss": 0.3}, None).passed
    verdict = judge(GATE, "m", {"auc": 0.89, "log_loss": 0.31}, None)
    assert not verdict.passed
    assert verdict.reasons() == "auc: wanted >= 0.9, seen 0.89000; log_loss: wanted <= 0.3, seen 0.31000"


def test_a_metric_that_a_model_lacks_is_refused() -> None:
    verdict = judge(GATE, "LinearSVC", {"auc": 0.95}, None)
    assert not verdict.passed and "log_loss: wanted <= 0.3, seen nothing" in verdict.reasons()


@pytest.mark.parametrize(("low", "high", "passed"), [(-0.2, -0.1, False), (-0.1, 0.1, True), (0.1, 0.2, True)])
def test_against_the_champion(low: float, high: float, passed: bool) -> None:
    difference = Difference(metric="auc", mean=(low + high) / 2, low=low, high=high, confidence=0.95, rows=10)
    assert judge(Gate(), "m", {}, difference).passed is passed


def test_weighted_auc_is_scikit_learns() -> None:
    generator = np.random.default_rng(0)
    label = (generator.random(500) < 0.3).astype(float)
    score = np.round(label * 0.5 + generator.random(500), 1)  # with ties
    weights = generator.integers(0, 4, 500).astype(float)
    assert _Weighted("auc", label, score)(weights) == pytest.approx(roc_auc_score(label, score, sample_weight=weights))


def test_paired_bootstrap_tells_better_from_noise() -> None:
    generator = np.random.default_rng(1)
    label = (generator.random(2000) < 0.5).astype(float)
    good, same = label + generator.normal(0, 1, 2000), None
    bad = label * 0.3 + generator.normal(0, 1, 2000)
    better = paired_bootstrap("auc", label, good, bad, confidence=0.95, seed=0)
    assert better.low > 0 and better.mean == pytest.approx(roc_auc_score(label, good) - roc_auc_score(label, bad))
    worse = paired_bootstrap("auc", label, bad, good, confidence=0.95, seed=0)
    assert worse.high < 0
    same = paired_bootstrap("auc", label, good, good, confidence=0.95, seed=0)
    assert same.low == same.high == same.mean == 0


def test_lower_is_better_for_losses() -> None:
    zeros, ones = np.zeros(50), np.ones(50)
    assert paired_bootstrap("log_loss", zeros, zeros, ones, confidence=0.9, seed=0).low > 0
    assert paired_bootstrap("rmse", zeros, ones, zeros, confidence=0.9, seed=0).high < 0
