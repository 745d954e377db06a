"""Validation metrics that ranks add up are scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from pipelines.lake import LabelSpec
from pipelines.train.measures import Measures
from tests.ranks import run_ranks

ROWS = 200_000
CPU = torch.device("cpu")


def measured(spec: LabelSpec, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """In batches on this rank, which takes every other row."""
    rank = torch.distributed.get_rank()
    measures = Measures(spec, CPU)
    for at in range(rank * 1000, len(labels), 2000):
        batch = torch.from_numpy(outputs[at : at + 1000])
        measures.add(batch.view(len(batch), -1), torch.from_numpy(labels[at : at + 1000]))
    return measures.reduced()


def on_two_ranks(spec: LabelSpec, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    first, second = run_ranks(2, measured, spec, outputs, labels)
    assert first == second
    return first


@pytest.mark.parametrize("decimals", [None, 1])
def test_areas_of_a_binary_label(decimals: int | None) -> None:
    generator = np.random.default_rng(0)
    labels = (generator.random(ROWS) < 0.1).astype(np.int64)
    outputs = (generator.normal(size=ROWS) + 1.5 * labels - 2).astype(np.float32)
    outputs = outputs if decimals is None else outputs.round(decimals)  # ties, and zeros of both signs
    found = on_two_ranks(LabelSpec(kind="binary", column="y", classes=("0", "1")), outputs, labels)
    assert found["auc"] == pytest.approx(sk.roc_auc_score(labels, outputs), abs=1e-6)
    if decimals is None:
        assert found["pr_auc"] == pytest.approx(sk.average_precision_score(labels, outputs), abs=1e-3)


def test_errors_of_a_real_label() -> None:
    generator = np.random.default_rng(0)
    labels = 1e6 + 50 * generator.normal(size=ROWS)
    outputs = ((labels - 1e6) / 50 + 0.3 * generator.normal(size=ROWS)).astype(np.float32)
    found = on_two_ranks(LabelSpec(kind="real", column="y", mean=1e6, std=50.0), outputs, labels)
    served = outputs.astype(np.float64) * 50 + 1e6
    assert found["r2"] == pytest.approx(sk.r2_score(labels, served), rel=1e-9)
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(labels, served), rel=1e-9)


def test_deviance_of_a_count() -> None:
    generator = np.random.default_rng(0)
    labels = generator.poisson(2.5, ROWS).astype(np.float64)
    outputs = generator.normal(size=ROWS).astype(np.float32)
    found = on_two_ranks(LabelSpec(kind="count", column="y", mean=2.5), outputs, labels)
    rates = 2.5 * np.exp(outputs.astype(np.float64))
    assert found["poisson_deviance"] == pytest.approx(sk.mean_poisson_deviance(labels, rates), rel=1e-9)
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(labels, rates), rel=1e-9) and len(found) == 2


def test_scores_of_several_classes_a_row() -> None:
    generator = np.random.default_rng(0)
    labels = (generator.random((5000, 3)) < [0.5, 0.1, 0.0]).astype(np.int8)
    outputs = (generator.normal(size=labels.shape) + 2 * labels - 1).astype(np.float32)
    found = on_two_ranks(LabelSpec(kind="multilabel", column="y", classes=("a", "b", "c")), outputs, labels)
    shares = 1 / (1 + np.exp(-outputs.astype(np.float64)))
    wanted = {
        f"f1_{how}": sk.f1_score(labels, outputs >= 0, average=how, zero_division=0) for how in ("micro", "macro")
    }
    wanted["log_loss"] = sk.log_loss(labels.ravel(), shares.ravel())
    assert found == pytest.approx(wanted, rel=1e-9)


def test_a_single_class_has_no_areas() -> None:
    spec = LabelSpec(kind="binary", column="y", classes=("0", "1"))
    assert on_two_ranks(spec, np.ones(4, dtype=np.float32), np.ones(4, dtype=np.int64)) == {}
