"""Intervals by resampled rows: each metric is scikit-learn's, and a difference is told from noise."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import ks_2samp
from sklearn import metrics as sk

from pipelines.bootstrap import Floats, _Weighted, resample
from pipelines.concordance import concordance

Measure = Callable[[Floats, Floats], float]


def pr_auc(label: Floats, score: Floats) -> float:
    precision, recall, _ = sk.precision_recall_curve(label, score)
    precision[-1] = precision[-2]  # the first precision, not 1, stands at recall 0
    return float(sk.auc(recall, precision))


BY_ORDER: dict[str, Measure] = {
    "auc": sk.roc_auc_score,
    "pr_auc": pr_auc,
    "ks": lambda label, score: float(ks_2samp(score[label > 0], score[label == 0]).statistic),
}


@pytest.mark.parametrize("metric", BY_ORDER)
def test_a_weight_is_so_many_rows(metric: str) -> None:
    generator = np.random.default_rng(0)
    label = (generator.random(500) < 0.3).astype(float)
    score = np.round(label * 0.5 + generator.random(500), 1)  # with ties
    weights = generator.integers(0, 4, 500)
    wanted = BY_ORDER[metric](np.repeat(label, weights), np.repeat(score, weights))
    assert _Weighted(metric, label, score)(weights.astype(float)) == pytest.approx(wanted)


def test_errors_of_a_real_label() -> None:
    generator = np.random.default_rng(0)
    label, weights = generator.normal(50, 10, 300), generator.integers(0, 4, 300)
    prediction = label + generator.normal(0, 3, 300)
    squared = (prediction - label) ** 2
    rows = np.repeat(label, weights), np.repeat(prediction, weights)
    assert _Weighted("r2", label, squared)(weights.astype(float)) == pytest.approx(sk.r2_score(*rows))
    assert _Weighted("rmse", label, squared)(weights.astype(float)) == pytest.approx(sk.root_mean_squared_error(*rows))


def test_the_perplexity_of_drawn_rows() -> None:
    losses = np.array([0.5, 2.0, 1.0])
    assert _Weighted("perplexity", np.zeros(3), losses)(np.array([2.0, 0.0, 1.0])) == pytest.approx(np.exp(2.0 / 3))


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_f1_of_drawn_rows(average: str) -> None:
    generator = np.random.default_rng(0)
    has, said = generator.random((200, 3)) < 0.3, generator.random((200, 3)) < 0.4
    weights = generator.integers(0, 4, 200)
    hits, wrong = (has & said).astype(float), (has != said).astype(float)
    counts = [hits, wrong] if average == "macro" else [hits.sum(axis=1), wrong.sum(axis=1)]
    wanted = sk.f1_score(np.repeat(has, weights, axis=0), np.repeat(said, weights, axis=0), average=average)
    found = _Weighted(f"f1_{average}", np.zeros(200), np.column_stack(counts))(weights.astype(float))
    assert found == pytest.approx(wanted)


def by_pairs(label: Floats, prediction: Floats) -> float:
    won = num = 0.0
    for (time, event), said in zip(label, prediction, strict=True):
        for (other, other_event), other_said in zip(label, prediction, strict=True):
            if event and (time < other or (time == other and not other_event)):
                num, won = num + 1, won + (said < other_said) + 0.5 * (said == other_said)
    return won / num


def test_concordance_of_drawn_rows() -> None:
    generator = np.random.default_rng(0)
    label = np.column_stack([generator.integers(1, 30, 300), generator.random(300) < 0.6]).astype(float)  # with ties
    prediction = np.round(label[:, 0] + generator.normal(0, 10, 300))
    assert concordance(label, prediction) == pytest.approx(by_pairs(label, prediction))
    weights = generator.integers(0, 3, 300)
    wanted = by_pairs(np.repeat(label, weights, axis=0), np.repeat(prediction, weights))
    assert _Weighted("concordance", label, prediction)(weights.astype(float)) == pytest.approx(wanted)
    assert np.isnan(concordance(label * [1, 0], prediction)), "nobody was seen to the end"


def test_an_interval_is_as_wide_as_theory_says() -> None:
    hits = (np.random.default_rng(0).random(2000) < 0.8).astype(float)
    interval = resample("accuracy", hits, {"m": hits}, seed=0).interval("m", confidence=0.95)
    error = 1.96 * np.sqrt(hits.mean() * (1 - hits.mean()) / 2000)
    assert interval.low == pytest.approx(hits.mean() - error, abs=0.003)
    assert interval.high == pytest.approx(hits.mean() + error, abs=0.003)
    assert (interval.confidence, interval.rows) == (0.95, 2000)


def test_better_is_told_from_noise() -> None:
    generator = np.random.default_rng(1)
    label = (generator.random(2000) < 0.5).astype(float)
    good = label + generator.normal(0, 1, 2000)
    bad = label * 0.3 + generator.normal(0, 1, 2000)
    drawn = resample("auc", label, {"good": good, "bad": bad, "same": good}, seed=0)
    better = drawn.difference("good", "bad", confidence=0.95)
    assert better.low > 0 and better.mean == pytest.approx(sk.roc_auc_score(label, good) - sk.roc_auc_score(label, bad))
    assert drawn.difference("bad", "good", confidence=0.95).high < 0
    same = drawn.difference("good", "same", confidence=0.95)
    assert same.low == same.high == same.mean == 0


def test_one_class_has_no_interval() -> None:
    assert not resample("auc", np.ones(20), {"m": np.arange(20.0)}, seed=0).values


@pytest.mark.parametrize("metric", ["log_loss", "rmse", "poisson_deviance"])
def test_lower_is_better_for_losses(metric: str) -> None:
    zeros, ones = np.zeros(50), np.ones(50)
    drawn = resample(metric, zeros, {"right": zeros, "wrong": ones}, seed=0)
    assert drawn.difference("right", "wrong", confidence=0.9).low > 0
