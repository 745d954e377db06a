"""Lanes leave a slow rank; the rows of each batch, the receipts and the network stay what they were."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipelines.lake import Snapshot
from pipelines.train import balance
from pipelines.train.job import EpochResult, TrainJob
from pipelines.train.loop import Trainer
from tests.ranks import run_ranks
from tests.tables import DENSE, contract_of, feature_table
from tests.train.test_loop import job_of


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return feature_table(tmp_path_factory.mktemp("t") / "t", [200, 199, 150], contract_of(DENSE))


def train(job: TrainJob) -> tuple[dict[str, Any], list[EpochResult], list[int]]:
    """On a rank: train, with rank 1 five times as slow a row; weights, epochs, and the lanes of each rank at the end."""
    trainer = Trainer(job, torch.device("cpu"))
    forward = trainer.objective.outputs
    per_row_s = 0.005 if dist.get_rank() == 1 else 0.001

    def slow(network: Any, *inputs: torch.Tensor) -> Any:
        time.sleep(per_row_s * len(inputs[0]))
        return forward(network, *inputs)

    trainer.objective.outputs = slow  # type: ignore[method-assign]
    trainer.run(lambda _: None)
    lanes = [len(share) for share in trainer.loader.assignment]
    return (
        {name: tensor.numpy().copy() for name, tensor in trainer.trained().state_dict().items()},
        trainer.epochs,
        lanes,
    )


def test_lanes_leave_a_slow_rank(tmp_path: Path, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "LOOK_EVERY_S", 0.3)
    monkeypatch.setattr(balance, "LEAD_S", 0.1)
    settings: dict[str, Any] = {"lanes": 16, "batch_size": 32, "epochs": 3}
    weights, epochs, lanes = run_ranks(2, train, job_of(tmp_path / "off", snapshot, **settings))[0]
    assert lanes == [8, 8]
    assert epochs[0].verdict.startswith("rank 1 takes") and "set train.balance: auto" in epochs[0].verdict
    for other, other_epochs, other_lanes in run_ranks(
        2, train, job_of(tmp_path / "on", snapshot, balance="auto", **settings)
    ):
        assert other_lanes[1] <= 5 and sum(other_lanes) == 16
        assert [(e.rows, e.row_id_sum) for e in other_epochs] == [(e.rows, e.row_id_sum) for e in epochs]
        for name, values in weights.items():
            np.testing.assert_allclose(other[name], values, rtol=0, atol=1e-13)


def test_lanes_leave_a_slow_rank_over_epochs_shorter_than_a_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balance, "LOOK_EVERY_S", 1.0)
    table = feature_table(tmp_path / "t", [64], contract_of(DENSE))
    settings: dict[str, Any] = {"lanes": 16, "batch_size": 32, "epochs": 30, "balance": "auto"}
    for _, epochs, lanes in run_ranks(2, train, job_of(tmp_path / "job", table, **settings)):
        assert len(epochs) == 30 and lanes[1] <= 5 and sum(lanes) == 16
