"""kill -9 of a Spark executor at any moment of a training on a standalone cluster: all ranks start again, no row is lost.

Moments are drawn uniformly over the wall time of an undisturbed job; the seed is printed, and HEADRACE_FAULT_SEED repeats
a run with it. A single kill waits for the ranks.
"""

import contextlib
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster import Submit, standalone_cluster, submitter
from tests.conftest import ROOT
from tests.faults import SEED
from tests.train.conftest import killed_at
from tests.train.test_strategy_faults import STRATEGIES, name_of

WORKLOAD = "conf/digits.yaml"
SETTINGS = ("classic=[]", "model={network: mlp, hidden: [32]}", "train.epochs=4", "train.checkpoint.every_steps=4")


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


def an_executor(generator: random.Random) -> psutil.Process | None:
    """One of the executors, which the cluster's Workers start."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "org.apache.spark.executor.CoarseGrainedExecutorBackend" in process.cmdline():
                found.append(process)
    return generator.choice(found) if found else None


CASES = [
    pytest.param(2, "data_parallel", 1, id="data_parallel-1", marks=pytest.mark.cluster),
    *(
        pytest.param(ranks, strategy, 20, id=f"{name_of(strategy)}-20", marks=pytest.mark.faults_strategies)
        for ranks, strategy in STRATEGIES
    ),
]


@pytest.mark.parametrize(("ranks", "strategy", "kills"), CASES)
def test_an_executor_is_killed(submit: Submit, lake: Path, ranks: int, strategy: Any, kills: int) -> None:
    def train() -> dict[str, Any]:
        result: dict[str, Any] = submit("train", WORKLOAD, *settings)["train"]["result"]
        (lake / "runs" / "digits" / "train.json").unlink()
        shutil.rmtree(lake / "runs" / "digits" / "train")
        return result

    settings = [*SETTINGS, f"train.ranks={ranks}", f"train.strategy={strategy}"]
    generator = random.Random(f"{SEED}:{name_of(strategy)}")
    began = time.monotonic()
    receipts = [(epoch["rows"], epoch["row_id_sum"]) for epoch in train()["epochs"]]
    wall_s = time.monotonic() - began
    print(f"seed {SEED}; {name_of(strategy)}, {ranks} ranks; undisturbed {wall_s:.1f} s")

    def victim() -> psutil.Process | None:
        has_ranks = any((lake / "runs" / "digits" / "train").glob("*/beat-rank-*.json"))
        return an_executor(generator) if kills > 1 or has_ranks else None

    for number in range(kills):
        after_s = generator.uniform(0, wall_s) if kills > 1 else 0.0
        with killed_at(after_s, victim) as pids:
            result = train()
        repeated = sum(epoch["exchange"].get("repeated_rows", 0) for epoch in result["epochs"])
        print(f"{number}: {pids} after {after_s:.2f} s; {repeated:g} rows repeated; {result['restarts']}", flush=True)
        assert [(epoch["rows"], epoch["row_id_sum"]) for epoch in result["epochs"]] == receipts
        assert result["restarts"] or kills > 1
