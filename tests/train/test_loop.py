"""Training is the same at any number of ranks, accounts for every row, and goes on where it stopped."""

import contextlib
import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from pipelines.config.learning import Model, Train
from pipelines.errors import ConfigError, TrainingError
from pipelines.features.fitted import FittedFeatures, FittedLabel
from pipelines.lake import LabelSpec, Snapshot
from pipelines.stream import Batch, LaneLoader
from pipelines.train import checkpoint, loop
from pipelines.train.job import EpochResult, TrainJob
from pipelines.train.loop import Trainer
from tests.ranks import run_ranks
from tests.tables import DENSE, IMAGE, contract_of, feature_table, rated

Trained = tuple[dict[str, Any], list[EpochResult]]
REAL = LabelSpec(kind="real", column="y", mean=0.5, std=2.0)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return feature_table(tmp_path_factory.mktemp("t") / "t", [61, 40, 2], contract_of(DENSE))


def job_of(folder: Path, snapshot: Snapshot, *, network: dict[str, Any] | None = None, **train: Any) -> TrainJob:
    settings = {"lanes": 6, "batch_size": 12, "epochs": 2, "lr": 0.05, "optimizer": "SGD"} | train
    folder.mkdir(parents=True, exist_ok=True)
    assert snapshot.contract is not None
    return TrainJob(
        workload="w",
        folder=folder,
        model=Model.model_validate(network or {"network": "tests.networks:Double"}),
        train=Train.model_validate(settings),
        seed=0,
        snapshot=snapshot,
        validation=None,
        fitted=FittedFeatures(inputs=(), label=FittedLabel(spec=snapshot.contract.label)),
        tracking_uri="",
        run_id="",
        keep_checkpoints=2,
    )


def train(job: TrainJob) -> Trained:
    """On a rank: train the job; weights as arrays, and epochs."""
    trainer = Trainer(job, torch.device("cpu"))
    trainer.resume()
    trainer.run(lambda _: None)
    return {name: tensor.numpy().copy() for name, tensor in trainer.trained().state_dict().items()}, trainer.epochs


def assert_trained_alike(seen: Trained, wanted: Trained, *, atol: float, loss_atol: float) -> None:
    """The same weights, within `atol`, from the same rows at the same loss in each epoch."""
    (weights, epochs), (wanted_weights, wanted_epochs) = seen, wanted
    for name, values in wanted_weights.items():
        np.testing.assert_allclose(weights[name], values, rtol=0, atol=atol)
    for ours, theirs in zip(epochs, wanted_epochs, strict=True):
        assert (ours.rows, ours.row_id_sum) == (theirs.rows, theirs.row_id_sum)
        assert ours.loss == pytest.approx(theirs.loss, abs=loss_atol)


def test_any_number_of_ranks_trains_the_same_network(tmp_path: Path, snapshot: Snapshot) -> None:
    """In float64, uneven lanes and a last batch that leaves ranks without rows included."""
    alone, epochs = run_ranks(1, train, job_of(tmp_path / "1", snapshot))[0]
    for world in (2, 3, 5):
        for trained in run_ranks(world, train, job_of(tmp_path / str(world), snapshot)):
            assert_trained_alike(trained, (alone, epochs), atol=1e-14, loss_atol=1e-13)


@pytest.mark.parametrize("lanes", [6, 12])
def test_two_towers_learn_from_the_same_negatives_at_any_number_of_ranks(tmp_path: Path, lanes: int) -> None:
    """In float64; a lane's rows are each other's negatives, wherever the lane is."""
    table = feature_table(tmp_path / "t", [61, 40, 2], rated())
    network = {"network": "tests.networks:DoubleTowers"}

    def job(folder: str) -> TrainJob:
        return job_of(tmp_path / folder, table, network=network, lanes=lanes, batch_size=48)

    alone = run_ranks(1, train, job("1"))[0]
    assert alone[1][0].metrics == {}, "affinities are no ratings"
    for world in (2, 3, 5):
        for trained in run_ranks(world, train, job(str(world))):
            assert_trained_alike(trained, alone, atol=1e-14, loss_atol=1e-13)


def test_weights_of_classes_are_the_same_at_any_number_of_ranks(tmp_path: Path, snapshot: Snapshot) -> None:
    def job(folder: str, weights: tuple[float, ...]) -> TrainJob:
        return job_of(tmp_path / folder, snapshot).model_copy(update={"class_weights": weights})

    alone = run_ranks(1, train, job("1", (0.25, 1.75)))[0]
    for trained in run_ranks(3, train, job("3", (0.25, 1.75))):
        assert_trained_alike(trained, alone, atol=1e-14, loss_atol=1e-13)
    alike = run_ranks(1, train, job("alike", (1.0, 1.0)))[0]
    assert_trained_alike(alike, run_ranks(1, train, job("none", ()))[0], atol=0, loss_atol=0)
    assert abs(alike[1][0].loss - alone[1][0].loss) > 1e-3


def test_each_epoch_has_a_receipt_that_agrees_with_the_snapshot(tmp_path: Path, snapshot: Snapshot) -> None:
    _, epochs = run_ranks(2, train, job_of(tmp_path, snapshot))[0]
    assert [(e.epoch, e.rows, e.row_id_sum) for e in epochs] == [
        (epoch, snapshot.rows, snapshot.row_id_sum) for epoch in range(2)
    ]
    assert all(e.rows_per_s > 0 and 0 <= e.data_wait_share <= 1 and "accuracy" in e.metrics for e in epochs)


class Altered(LaneLoader):
    """A loader that drops or repeats one batch."""

    drop = True

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if batch.step == 3:
                if not self.drop:
                    yield batch
                    yield batch
                continue
            yield batch


@pytest.mark.parametrize("drop", [True, False])
def test_a_dropped_or_repeated_batch_fails_the_epoch(
    tmp_path: Path, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, drop: bool
) -> None:
    monkeypatch.setattr(loop, "LaneLoader", Altered)
    monkeypatch.setattr(Altered, "drop", drop)
    with pytest.raises(TrainingError, match=r"epoch 0: the receipt does not agree with the Snapshot.*wanted 103 rows"):
        run_ranks(2, train, job_of(tmp_path, snapshot))


def test_goes_on_from_a_checkpoint_bit_for_bit(tmp_path: Path, snapshot: Snapshot) -> None:
    settings = {
        "optimizer": {"name": "AdamW", "weight_decay": 0.1},
        "schedule": {"name": "CosineAnnealingLR", "T_max": 40},
        "clip_grad_norm": 1.0,
    }
    network = {"network": "mlp", "hidden": [8], "dropout": 0.3}
    whole = run_ranks(2, train, job_of(tmp_path / "a", snapshot, network=network, epochs=4, **settings))[0]
    run_ranks(2, train, job_of(tmp_path / "b", snapshot, network=network, epochs=2, **settings))
    resumed = run_ranks(2, train, job_of(tmp_path / "b", snapshot, network=network, epochs=4, **settings))[0]
    for name, values in whole[0].items():
        np.testing.assert_array_equal(resumed[0][name], values)
    assert [e.loss for e in resumed[1]] == [e.loss for e in whole[1]]


def checkpoint_weights(path: Path) -> dict[str, Any]:
    tensors = load_file(path / "rank-0.safetensors")
    return {name.removeprefix("model."): values for name, values in tensors.items() if name.startswith("model.")}


def interrupted(job: TrainJob, steps: int) -> list[list[int]]:
    """On a rank: train, and stop without notice before step `steps`; the row ids of each step's batch."""
    trainer = Trainer(job, torch.device("cpu"))
    trainer.resume()
    taken: list[list[int]] = []
    step = trainer._step

    def counting(batch: Batch, tally: Any) -> None:
        if len(taken) == steps:
            raise InterruptedError
        taken.append(batch.tensors["row_id"][: batch.rows].tolist())
        step(batch, tally)

    trainer._step = counting  # type: ignore[method-assign]
    with contextlib.suppress(InterruptedError):
        trainer.run(lambda _: None)
    return taken


@pytest.mark.parametrize("world", [2, 3])
def test_goes_on_inside_an_epoch_bit_for_bit(tmp_path: Path, snapshot: Snapshot, world: int) -> None:
    """With dropout and batch statistics, an optimizer with state and a schedule."""
    settings = {
        "optimizer": {"name": "AdamW", "weight_decay": 0.1},
        "schedule": {"name": "OneCycleLR"},
        "checkpoint": {"every_steps": 4},
        "epochs": 3,
    }
    network = {"network": "mlp", "hidden": [8, 5], "dropout": 0.3}
    whole = run_ranks(world, train, job_of(tmp_path / "a", snapshot, network=network, **settings))
    job = job_of(tmp_path / "b", snapshot, network=network, **settings)
    for steps in (7, 3, 9):  # 9 steps an epoch: within one, before its first checkpoint, and over its end
        run_ranks(world, interrupted, job, steps)
    for trained, wanted in zip(run_ranks(world, train, job), whole, strict=True):
        assert_trained_alike(trained, wanted, atol=0, loss_atol=1e-12)


def test_goes_on_at_other_world_sizes_with_the_same_global_batches(tmp_path: Path, snapshot: Snapshot) -> None:
    """In float64; a restart repeats what came behind the last checkpoint, and nothing else."""
    settings = {"checkpoint": {"every_steps": 4}, "epochs": 2}
    alone = job_of(tmp_path / "a", snapshot, **settings)
    wanted = run_ranks(1, interrupted, alone, 100)[0]
    weights, epochs = run_ranks(1, train, alone)[0]
    job = job_of(tmp_path / "b", snapshot, **settings)
    steps: list[list[int]] = []
    for world, stop, done in ((4, 6, 0), (2, 3, 4), (3, 9, 4)):
        ranks = run_ranks(world, interrupted, job, stop)
        steps = steps[:done] + [list(chain(*parts)) for parts in zip(*ranks, strict=True)]
        assert steps == wanted[: len(steps)]
    for trained in run_ranks(5, train, job):
        assert_trained_alike(trained, (weights, epochs), atol=1e-13, loss_atol=1e-12)


def test_checkpoints_by_the_clock(tmp_path: Path, snapshot: Snapshot) -> None:
    job = job_of(tmp_path, snapshot, checkpoint={"every_s": 0.001}, epochs=1).model_copy(
        update={"keep_checkpoints": 99}
    )
    run_ranks(2, train, job)
    assert sorted(path.name for path in tmp_path.glob("epoch-*")) == [
        checkpoint.name_of(0, 8),
        checkpoint.name_of(1, 0),
    ]


def test_checkpoints_by_the_clock_in_epochs_of_few_steps(tmp_path: Path) -> None:
    table = feature_table(tmp_path / "t", [48], contract_of(DENSE))
    job = job_of(tmp_path / "job", table, checkpoint={"every_s": 0.001}, epochs=1)
    run_ranks(2, train, job.model_copy(update={"keep_checkpoints": 99}))
    assert sorted(path.name for path in job.folder.glob("epoch-*")) == [
        checkpoint.name_of(0, 3),
        checkpoint.name_of(1, 0),
    ]


@pytest.mark.parametrize("every_s", [3600, math.inf])
def test_checkpoints_behind_epochs_alone(tmp_path: Path, snapshot: Snapshot, every_s: float) -> None:
    run_ranks(2, train, job_of(tmp_path, snapshot, checkpoint={"every_s": every_s}, epochs=1))
    assert [path.name for path in tmp_path.glob("epoch-*")] == [checkpoint.name_of(1, 0)]


def test_a_checkpoint_of_another_seed_or_batch_is_refused(tmp_path: Path, snapshot: Snapshot) -> None:
    run_ranks(1, train, job_of(tmp_path, snapshot, epochs=1))
    with pytest.raises(TrainingError, match=r"epoch-0001-step-00000000: loader state: batch_size: wanted 6, .* has 12"):
        run_ranks(1, train, job_of(tmp_path, snapshot, batch_size=6))
    with pytest.raises(TrainingError, match="seed: wanted 1, the state has 0"):
        run_ranks(1, train, job_of(tmp_path, snapshot).model_copy(update={"seed": 1}))


def test_another_world_size_is_welcome(tmp_path: Path, snapshot: Snapshot) -> None:
    run_ranks(3, train, job_of(tmp_path, snapshot, epochs=1))
    _, epochs = run_ranks(2, train, job_of(tmp_path, snapshot, epochs=3))[0]
    assert len(epochs) == 3


def test_early_stopping_keeps_the_best_epoch(tmp_path: Path, snapshot: Snapshot) -> None:
    other = feature_table(tmp_path / "other", [20], contract_of(DENSE), seed=9)
    job = job_of(tmp_path / "job", snapshot, epochs=30, lr=3.0, early_stopping={"metric": "loss", "patience": 2})
    job = job.model_copy(update={"validation": other})

    weights, epochs = run_ranks(2, train, job)[0]
    losses = [epoch.metrics["validation_loss"] for epoch in epochs]
    best = losses.index(min(losses))
    assert len(epochs) == best + 3 < 30
    for name, values in checkpoint_weights(job.folder / checkpoint.name_of(best + 1, 0)).items():
        np.testing.assert_array_equal(values, weights[name])


def batches_tracked(job: TrainJob) -> int:
    """On a rank: of its own, as they are before ranks agree on the first one's."""
    trainer = Trainer(job, torch.device("cpu"))
    trainer.strategy.agree = lambda: None  # type: ignore[method-assign]
    trainer.run(lambda _: None)
    return int(trainer.network.state_dict()["norm.num_batches_tracked"])


def test_batch_statistics_of_the_row_of_zeros_are_not_kept(tmp_path: Path) -> None:
    snapshot = feature_table(tmp_path / "t", [2], contract_of(IMAGE))
    network = {"network": "tests.networks:Normalized"}
    job = job_of(tmp_path / "job", snapshot, network=network, lanes=3, batch_size=3, epochs=1)
    first, *others = run_ranks(3, batches_tracked, job)
    assert first == 0 and others == [1, 1], "the first lane has no row"


def test_a_real_label_learns_in_units_of_its_deviation(tmp_path: Path) -> None:
    snapshot = feature_table(tmp_path / "t", [200], contract_of(DENSE, label=REAL))
    _, epochs = run_ranks(2, train, job_of(tmp_path / "job", snapshot, epochs=20, lr=0.3))[0]
    assert epochs[-1].metrics["rmse"] < 0.2 < epochs[0].metrics["rmse"], "rmse is in the label's own units"


def test_settings_that_torch_refuses(tmp_path: Path, snapshot: Snapshot) -> None:
    with pytest.raises(ConfigError, match=r"train\.optimizer: SGD"):
        run_ranks(1, train, job_of(tmp_path, snapshot, optimizer={"name": "SGD", "momentum": -1}))
    with pytest.raises(ConfigError, match=r"wanted a class at tests\.networks:Nope"):
        run_ranks(1, train, job_of(tmp_path, snapshot, network={"network": "tests.networks:Nope"}))
    with pytest.raises(ConfigError, match="did you mean 'hidden'"):
        run_ranks(1, train, job_of(tmp_path, snapshot, network={"network": "tests.networks:Double", "hiden": 3}))
