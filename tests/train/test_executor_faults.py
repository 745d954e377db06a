"""kill -9 of a Spark executor that hosts ranks, at any of their moments: all ranks start again, no row is lost.

The seed is printed, and HEADRACE_FAULT_SEED repeats a run with it.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines import session
from pipelines.config import load_config
from pipelines.lake import runs_path
from pipelines.stage import Made
from pipelines.train.launch import WORKER
from tests.cluster import standalone_cluster, submitter
from tests.conftest import ROOT
from tests.train.conftest import children_that, killed_at, trained_under_kills
from tests.train.test_strategy_faults import SETTINGS, STRATEGIES, name_of

WORKLOAD = "conf/digits.yaml"
ALIKE = ("data_parallel-topk", "parameter_server-2")  # hooks and servers make no difference to it
CASES = [pytest.param(*case, id=name_of(case[1])) for case in STRATEGIES if name_of(case[1]) not in ALIKE]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with standalone_cluster(tmp_path_factory.mktemp("cluster"), ROOT / "conf" / "spark.conf", cores=2) as conf:
        yield conf


@pytest.fixture(scope="module")
def driver(cluster: Path, session_lake: Path) -> Iterator[None]:
    """This process is the cluster's driver, so that only ranks start anew for each kill."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRACE_LAKE", str(session_lake))
        session.use_properties(cluster)
        session.get_session(load_config(WORKLOAD, ["lake.shared=true"]), keeps_events=False)
    yield
    session.stop_session()
    session.use_properties(session.DEFAULT_PROPERTIES)


def executors() -> list[psutil.Process]:
    """Of the cluster's Workers, those that host ranks."""
    found = children_that(lambda command: "org.apache.spark.executor.CoarseGrainedExecutorBackend" in command)
    hosts = {parent.pid for rank in children_that(lambda command: WORKER in command) for parent in rank.parents()}
    return [executor for executor in found if executor.pid in hosts]


@pytest.mark.cluster
def test_a_lost_executor_starts_all_ranks_again(cluster: Path, lake: Path) -> None:
    submit = submitter(cluster, lake)
    settings = ("classic=[]", "model={network: mlp, hidden: [32]}", "train.epochs=8", "train.checkpoint.every_steps=4")
    submit("ingest", WORKLOAD)
    submit("features", WORKLOAD, *settings)

    def victim() -> psutil.Process | None:
        is_on = any((lake / "runs" / "digits" / "train").glob("*/epoch-*"))  # a checkpoint
        return next(iter(executors()), None) if is_on else None

    with killed_at(0.0, victim):
        receipts = submit("train", WORKLOAD, *settings)
    table, result = receipts["features"]["result"]["snapshots"]["train"], receipts["train"]["result"]
    assert "Spark lost executor" in result["restarts"][0] and result["resumed_from"] != [0, 0]
    for epoch in result["epochs"]:
        assert (epoch["rows"], epoch["row_id_sum"]) == (table["rows"], table["row_id_sum"])


@pytest.mark.faults_strategies
@pytest.mark.parametrize(("ranks", "strategy"), CASES)
def test_an_executor_is_killed(driver: None, train: Callable[..., Made], ranks: int, strategy: Any) -> None:
    settings = SETTINGS | {"ranks": ranks, "strategy": strategy, "launcher": "spark", "epochs": 20}

    def made() -> dict[str, Any]:
        shutil.rmtree(runs_path("tiny"), ignore_errors=True)
        return train("mlp", **settings, checkpoint={"every_steps": 4}).result

    trained_under_kills(name_of(strategy), 20, made, executors)
