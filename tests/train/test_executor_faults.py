"""kill -9 of a Spark executor that hosts ranks, at any of their moments: all ranks start again, no row is lost.

The seed is printed, and HEADRACE_FAULT_SEED repeats a run with it.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.train.launch import WORKER
from tests.cluster import Submit, standalone_cluster, submitter
from tests.conftest import ROOT
from tests.train.conftest import children_that, killed_at, trained_under_kills
from tests.train.test_strategy_faults import STRATEGIES, name_of

WORKLOAD = "conf/digits.yaml"
ALIKE = ("data_parallel-topk", "parameter_server-2")  # hooks and servers make no difference to it
SETTINGS = ("classic=[]", "model={network: mlp, hidden: [32]}", "train.epochs=8", "train.checkpoint.every_steps=4")


CASES = [pytest.param(*case, id=name_of(case[1])) for case in STRATEGIES if name_of(case[1]) not in ALIKE]


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lake")


@pytest.fixture(scope="module")
def submit(lake: Path, session_lake: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Submit]:
    (lake / "mlflow.db").write_bytes((session_lake / "mlflow.db").read_bytes())
    folder = tmp_path_factory.mktemp("cluster")
    with standalone_cluster(folder, ROOT / "conf" / "spark.conf", cores=2) as conf:
        made = submitter(conf, lake)
        made("ingest", WORKLOAD)
        made("features", WORKLOAD, *SETTINGS)
        yield made


def executors() -> list[psutil.Process]:
    """Of the cluster's Workers, those that host ranks."""
    found = children_that(lambda command: "org.apache.spark.executor.CoarseGrainedExecutorBackend" in command)
    hosts = {parent.pid for rank in children_that(lambda command: WORKER in command) for parent in rank.parents()}
    return [executor for executor in found if executor.pid in hosts]


@pytest.mark.cluster
def test_a_lost_executor_starts_all_ranks_again(submit: Submit, lake: Path) -> None:
    def victim() -> psutil.Process | None:
        is_on = any((lake / "runs" / "digits" / "train").glob("*/epoch-*"))  # a checkpoint
        return executors()[0] if is_on else None

    with killed_at(0.0, victim):
        receipts = submit("train", WORKLOAD, *SETTINGS)
    table, result = receipts["features"]["result"]["snapshots"]["train"], receipts["train"]["result"]
    assert "Spark lost executor" in result["restarts"][0] and result["resumed_from"] != [0, 0]
    for epoch in result["epochs"]:
        assert (epoch["rows"], epoch["row_id_sum"]) == (table["rows"], table["row_id_sum"])


@pytest.mark.faults_strategies
@pytest.mark.parametrize(("ranks", "strategy"), CASES)
def test_an_executor_is_killed(submit: Submit, lake: Path, ranks: int, strategy: Any) -> None:
    def made() -> dict[str, Any]:
        (lake / "runs" / "digits" / "train.json").unlink(missing_ok=True)
        shutil.rmtree(lake / "runs" / "digits" / "train", ignore_errors=True)
        result: dict[str, Any] = submit("train", WORKLOAD, *settings)["train"]["result"]
        return result

    settings = [*SETTINGS, f"train.ranks={ranks}", f"train.strategy={strategy}"]
    trained_under_kills(name_of(strategy), 20, made, executors)
