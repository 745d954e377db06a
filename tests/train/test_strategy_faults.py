"""kill -9 of any process of any strategy at any moment: the run ends well, and its receipts account for every row.

Moments are drawn uniformly over the wall time of an undisturbed run, and the process from those that are there. The
seed is printed; HEADRACE_FAULT_SEED repeats a run with it.
"""

import shutil
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from pipelines.lake import runs_path
from pipelines.stage import Made
from tests.train.conftest import children_that, trained_under_kills
from tests.train.test_elastic import updates

SETTINGS: dict[str, Any] = {"batch_size": 8, "epochs": 4, "timeout_s": 30, "threads": 1, "max_restarts": 3}
STRATEGIES: list[tuple[int, Any]] = [
    (2, {"name": "data_parallel", "hook": {"name": "powersgd", "warmup_steps": 4}}),
    (2, {"name": "data_parallel", "hook": {"name": "topk", "warmup_steps": 4}}),
    (3, "sharded"),
    (2, "tensor_parallel"),
    (2, "pipeline_parallel"),
    (4, {"name": "tensor_parallel", "size": 2}),
    (2, {"name": "local_sgd", "every_steps": 4}),
    (3, {"name": "diloco", "every_steps": 4}),
    (3, "parameter_server"),
    (4, {"name": "parameter_server", "servers": 2}),
    (4, "backup_workers"),
    (4, "gossip"),
]
SYNCHRONOUS = ("data_parallel", "sharded", "tensor_parallel", "pipeline_parallel", "local_sgd", "diloco")


def name_of(strategy: Any) -> str:
    if isinstance(strategy, str):
        return strategy
    return "-".join(str(x["name"] if isinstance(x, dict) else x) for x in strategy.values())


def forked_processes() -> list[psutil.Process]:
    """The ranks, and the children of those that keep one; all forked from here."""
    ours = psutil.Process().cmdline()
    return children_that(lambda command: command == ours)


SHORT = ("sharded", "pipeline_parallel", "diloco", "parameter_server-2")
CASES = [
    *(pytest.param(*case, 1, id=f"{name_of(case[1])}-1") for case in STRATEGIES if name_of(case[1]).startswith(SHORT)),
    *(pytest.param(*case, 20, id=f"{name_of(case[1])}-20", marks=pytest.mark.faults_strategies) for case in STRATEGIES),
]


@pytest.mark.parametrize(("ranks", "strategy", "kills"), CASES)
def test_whoever_is_killed(
    forked_ranks: None, train: Callable[..., Made], ranks: int, strategy: Any, kills: int
) -> None:
    settings = SETTINGS | {"ranks": ranks, "strategy": strategy, "checkpoint": {"every_steps": 4}}

    def made() -> dict[str, Any]:
        shutil.rmtree(runs_path("tiny"), ignore_errors=True)
        result = train("mlp", **settings).result
        if name_of(strategy) == "parameter_server-2":
            assert len(updates()) == 1, "no server learned from a part twice"
        return result

    whole, results = trained_under_kills(name_of(strategy), kills, made, forked_processes)
    if name_of(strategy).startswith(SYNCHRONOUS):
        losses = [epoch["loss"] for epoch in whole["epochs"]]
        for result in results:
            assert [epoch["loss"] for epoch in result["epochs"]] == pytest.approx(losses, abs=1e-5)
