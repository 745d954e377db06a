"""A checkpoint comes back exactly, is whole or absent, and holds no pickle."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from pipelines.config.catalog import OPTIMIZERS, SCHEDULES
from pipelines.config.learning import Train
from pipelines.errors import TrainingError
from pipelines.train import checkpoint
from pipelines.train.checkpoint import Saved, State
from pipelines.train.job import EpochResult, checkpoints
from pipelines.train.optimizer import make_optimizer, make_schedule
from pipelines.train.tally import Sums

NEEDED = {
    "MultiStepLR": {"milestones": [3, 5]},
    "StepLR": {"step_size": 2},
    "ExponentialLR": {"gamma": 0.9},
    "CyclicLR": {"base_lr": 0.001, "max_lr": 0.01, "cycle_momentum": False},
    "CosineAnnealingWarmRestarts": {"T_0": 4},
}


class Run:
    """A network, its optimizer and its schedule, with steps on fixed data."""

    def __init__(self, **train: object) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        settings = Train.model_validate({"lr": 0.01, **train})
        self.optimizer = make_optimizer(settings, list(self.network.parameters()))
        self.schedule = make_schedule(settings, self.optimizer, total_steps=20)
        self.x = torch.randn(8, 3)

    def steps(self, num: int) -> None:
        for _ in range(num):
            self.optimizer.zero_grad()
            (self.network(self.x) ** 2).mean().backward()
            self.optimizer.step()
            if self.schedule:
                self.schedule.step()

    def save(self, folder: Path, epochs: int = 1, *, step: int = 0) -> Path:
        epoch = EpochResult(epoch=0, rows=1, row_id_sum=2, loss=0.5, metrics={}, rows_per_s=1.0, data_wait_share=0.0)
        state = State(
            loader={"epoch": epochs, "step": step},
            sums=Sums(rows=3 * step),
            seconds=1.5,
            epochs=[epoch] * epochs,
            best_epoch=0,
            schedule=checkpoint.schedule_state(self.schedule),
            param_groups=checkpoint.param_groups(self.optimizer),
        )
        held = checkpoint.held_by(self.network)
        tensors = checkpoint.model_tensors(held) | checkpoint.optimizer_tensors(held, self.optimizer)
        return checkpoint.save(folder, state, tensors | {"rng.cpu": torch.get_rng_state()})

    def load(self, path: Path) -> State:
        saved, held = Saved(path), checkpoint.held_by(self.network)
        checkpoint.put_back_model(saved, held)
        checkpoint.put_back_optimizer(saved.optimizer(), saved.state.param_groups, held, self.optimizer)
        if self.schedule:
            self.schedule.load_state_dict(saved.state.schedule)
        drawn_from = saved.generators(0)
        assert drawn_from is not None
        torch.set_rng_state(drawn_from["cpu"])
        return saved.state


@pytest.mark.parametrize(
    "settings",
    [{"optimizer": n} for n in OPTIMIZERS] + [{"schedule": {"name": n, **NEEDED.get(n, {})}} for n in SCHEDULES],
)
def test_every_optimizer_and_schedule_goes_on_bit_for_bit(tmp_path: Path, settings: dict[str, object]) -> None:
    whole, first, second = Run(**settings), Run(**settings), Run(**settings)
    whole.steps(10)
    first.steps(4)
    second.load(first.save(tmp_path))
    second.steps(6)
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(second.network.state_dict()[name], tensor), name


def test_files_are_safetensors_and_json(tmp_path: Path) -> None:
    run = Run(optimizer="Adam")
    run.steps(1)
    path = run.save(tmp_path)
    assert sorted(os.listdir(path)) == ["rank-0.safetensors", "state.json"]
    with safe_open(path / "rank-0.safetensors", "pt") as file:
        assert {name.partition(".")[0] for name in file.keys()}  # noqa: SIM118 == {"model", "optimizer", "rng"}


def test_a_half_written_checkpoint_does_not_count(tmp_path: Path) -> None:
    run = Run()
    run.steps(1)
    path = run.save(tmp_path, epochs=1)
    half = tmp_path / ".epoch-0001-step-00000009.123"
    half.mkdir()
    (half / "rank-0.safetensors").write_bytes(b"half")
    assert checkpoints(tmp_path) == [path]
    checkpoint.prune(tmp_path, keep=2, best_epoch=0)
    assert not half.exists() and path.exists()


def test_the_last_is_that_of_the_latest_step(tmp_path: Path) -> None:
    run = Run()
    for epochs, step in ((10_000, 0), (1, 0), (0, 90), (10_000, 1200), (9_999, 1300)):
        run.save(tmp_path, epochs, step=step)
    path = checkpoints(tmp_path)[-1]
    assert path.name == "epoch-10000-step-00001200"
    state = run.load(path)
    assert (state.loader, state.sums.rows, state.seconds) == ({"epoch": 10_000, "step": 1200}, 3600, 1.5)


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    run = Run()
    run.steps(1)
    for epochs in range(1, 7):
        run.save(tmp_path, epochs=epochs)
        run.save(tmp_path, epochs=epochs, step=7)
        checkpoint.prune(tmp_path, keep=2, best_epoch=1)
    assert sorted(os.listdir(tmp_path)) == [
        "epoch-0002-step-00000000",
        "epoch-0006-step-00000000",
        "epoch-0006-step-00000007",
    ]


@pytest.mark.parametrize("name", ["rank-0.safetensors", "state.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    path = Run().save(tmp_path)
    (path / name).write_bytes(b"\x80\x04\x95nonsense")
    with pytest.raises(TrainingError, match="wanted a checkpoint"):
        Run().load(path)


@pytest.mark.parametrize("place", [-1, -2000, -5100])
def test_a_flipped_bit_is_named(tmp_path: Path, place: int) -> None:
    run, name = Run(optimizer="Adam"), "rank-0.safetensors"
    run.steps(1)
    path = run.save(tmp_path)
    content = bytearray((path / name).read_bytes())
    content[place] ^= 1  # of a number: the file is as well-formed as before
    (path / name).write_bytes(content)
    with pytest.raises(TrainingError, match=f"wanted a checkpoint, seen {name} with another digest than was written"):
        Run(optimizer="Adam").load(path)


def test_a_pickle_in_place_of_tensors_is_not_run(tmp_path: Path) -> None:
    path = Run().save(tmp_path)
    canary = tmp_path / "canary"
    (path / "rank-0.safetensors").write_bytes(b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    with pytest.raises(TrainingError):
        Run().load(path)
    assert not canary.exists()
