"""The gate passes and refuses by its bounds."""

import pytest

from pipelines.bootstrap import Difference
from pipelines.config.workload import Gate
from pipelines.gate import judge

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
