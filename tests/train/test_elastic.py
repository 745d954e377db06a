"""Ranks that no collective joins: a parameter server, and backup workers."""

from collections.abc import Callable

import pytest

from pipelines.stage import Made

SETTINGS = {"ranks": 3, "batch_size": 16, "epochs": 3, "timeout_s": 30, "threads": 1, "lr": 0.05}


@pytest.mark.parametrize("strategy", ["parameter_server", "backup_workers"])
def test_every_row_is_accounted_for(train: Callable[..., Made], strategy: str) -> None:
    made = train(strategy=strategy, **SETTINGS)
    print(made.result["epochs"], made.lines)
    assert [epoch["rows"] for epoch in made.result["epochs"]] == [120] * 3
