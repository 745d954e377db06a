"""However the ranks share the work, they learn what one process learns."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.lake import Snapshot
from pipelines.train.job import TrainJob
from pipelines.train.loop import Trainer
from tests.ranks import run_ranks
from tests.tables import DENSE, contract_of, feature_table
from tests.train.test_loop import assert_trained_alike, job_of, train

LAYERS = {"network": "tests.networks:DoubleLayers"}
ADAM = {"optimizer": {"name": "AdamW", "weight_decay": 0.1}, "clip_grad_norm": 0.5}
EXACT: list[tuple[int, Any, dict[str, Any]]] = [
    (2, "data_parallel", {"micro_batches": 3}),
    (4, "data_parallel", {}),
    (2, "sharded", {}),
    (4, "sharded", {"micro_batches": 2}),
    (2, "tensor_parallel", {"micro_batches": 2}),
    (4, "tensor_parallel", {}),
    (2, "pipeline_parallel", {}),
    (4, {"name": "pipeline_parallel", "schedule": "GPipe"}, {"micro_batches": 5}),
    (4, {"name": "tensor_parallel", "size": 2}, {}),
    (4, {"name": "pipeline_parallel", "size": 2}, {"micro_batches": 3}),
    (2, {"name": "local_sgd", "warmup_steps": 10**6}, {}),
]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return feature_table(tmp_path_factory.mktemp("t") / "t", [61, 40, 2], contract_of(DENSE))


@pytest.fixture(scope="module")
def validation(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return feature_table(tmp_path_factory.mktemp("v") / "v", [37], contract_of(DENSE), seed=9)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, snapshot: Snapshot, validation: Snapshot) -> Any:
    job = job_of(tmp_path_factory.mktemp("alone"), snapshot, network=LAYERS, **ADAM)
    return run_ranks(1, train, job.model_copy(update={"validation": validation}))[0]


@pytest.mark.parametrize(("ranks", "strategy", "settings"), EXACT)
def test_ranks_learn_what_one_process_learns(
    tmp_path: Path, snapshot: Snapshot, validation: Snapshot, alone: Any, ranks: int, strategy: Any, settings: Any
) -> None:
    """In float64, with a clipped gradient, lanes that are uneven and a last batch that leaves ranks without rows."""
    job = job_of(tmp_path, snapshot, network=LAYERS, strategy=strategy, ranks=ranks, **ADAM, **settings)
    for trained in run_ranks(ranks, train, job.model_copy(update={"validation": validation})):
        assert_trained_alike(trained, alone, atol=1e-10, loss_atol=1e-10)
        for ours, theirs in zip(trained[1], alone[1], strict=True):
            assert ours.metrics == pytest.approx(theirs.metrics, abs=1e-10)


def interrupted_then(job: TrainJob) -> None:
    """On a rank: stop without notice before step 7 of the first epoch."""
    trainer = Trainer(job, torch.device("cpu"))
    trainer.resume()
    step, taken = trainer._step, []

    def counting(*arguments: Any) -> None:
        if len(taken) == 7:
            raise InterruptedError
        taken.append(0)
        step(*arguments)

    trainer._step = counting  # type: ignore[method-assign]
    try:
        trainer.run(lambda _: None)
    except InterruptedError:
        return


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "data_parallel", "hook": "fp16"},
        {"name": "data_parallel", "hook": {"name": "powersgd", "warmup_steps": 2}},
        {"name": "data_parallel", "hook": {"name": "topk", "share": 0.1, "warmup_steps": 3}},
        {"name": "data_parallel", "hook": {"name": "qsgd", "bits": 4}},
        "sharded",
        "tensor_parallel",
        "pipeline_parallel",
        {"name": "local_sgd", "every_steps": 3},
        {"name": "diloco", "every_steps": 3},
    ],
)
def test_goes_on_inside_an_epoch_bit_for_bit(tmp_path: Path, snapshot: Snapshot, strategy: Any) -> None:
    settings = {"strategy": strategy, "ranks": 2, "checkpoint": {"every_steps": 3}, "network": LAYERS, **ADAM}
    whole = run_ranks(2, train, job_of(tmp_path / "whole", snapshot, **settings))
    job = job_of(tmp_path / "parts", snapshot, **settings)
    run_ranks(2, interrupted_then, job)
    assert list(job.folder.glob("epoch-0000-step-*")), "it left a checkpoint"
    for trained, wanted in zip(run_ranks(2, train, job), whole, strict=True):
        assert_trained_alike(trained, wanted, atol=0, loss_atol=1e-12)


def test_one_strategy_goes_on_where_another_stopped(tmp_path: Path, snapshot: Snapshot, alone: Any) -> None:
    """A checkpoint holds the whole network by its names; so it fits any number of ranks and any exact strategy."""
    job = None
    for ranks, strategy, epochs in (
        (4, "sharded", 1),
        (2, "tensor_parallel", 2),
        (4, "pipeline_parallel", 3),
        (1, "sharded", 4),
    ):
        job = job_of(tmp_path / "a", snapshot, network=LAYERS, strategy=strategy, ranks=ranks, epochs=epochs, **ADAM)
        trained = run_ranks(ranks, train, job)[0]
    wanted = run_ranks(1, train, job_of(tmp_path / "b", snapshot, network=LAYERS, epochs=4, **ADAM))[0]
    assert_trained_alike(trained, wanted, atol=1e-10, loss_atol=1e-10)
