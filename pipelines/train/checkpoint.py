"""Checkpoints: safetensors and JSON, written whole and then named. No pickle.

A checkpoint is a folder `epoch-0003-step-00000120` with `model.safetensors`, `optimizer.safetensors`,
`rng.safetensors` and `state.json`: training goes on from it at step 120 of epoch 3. It is written under another name
and renamed when all of it is on disk, so a folder with the name is whole.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipelines.errors import TrainingError, one_line
from pipelines.receipt import content_hash
from pipelines.train.job import EpochResult
from pipelines.train.tally import Sums

_MODEL, _OPTIMIZER, _GENERATORS = "model.safetensors", "optimizer.safetensors", "rng.safetensors"
_PATTERN = "epoch-[0-9]*-step-[0-9]*"


class State(BaseModel):
    """The JSON part of a checkpoint.

    Attributes:
        loader: The LaneLoader's state: what the order of rows depends on, and the epoch and step to go on with.
        sums: Of the rows that this epoch has trained on.
        seconds: Time that this epoch has taken.
        epochs: Results of the epochs that are done.
        best_epoch: The one with the best validation metric so far, the last one without validation.
        digests: sha256 of the files with tensors.
    """

    model_config = ConfigDict(frozen=True)

    loader: dict[str, Any]
    sums: Sums
    seconds: float
    epochs: list[EpochResult]
    best_epoch: int
    schedule: dict[str, Any]
    param_groups: list[dict[str, Any]]
    digests: dict[str, str] = {}

    @property
    def name(self) -> str:
        """The checkpoint's folder."""
        return name_of(self.loader["epoch"], self.loader["step"])


def name_of(epoch: int, step: int) -> str:
    """The folder of the checkpoint from which training goes on at that step."""
    return f"epoch-{epoch:04d}-step-{step:08d}"


def save(folder: Path, network: nn.Module, optimizer: Optimizer, state: State, generators: dict[str, Tensor]) -> Path:
    """Write a checkpoint. Returns its folder.

    Args:
        folder: The job's.
        network: Whose weights and buffers are kept.
        optimizer: Whose state is kept.
        state: The JSON part.
        generators: The random generators of the ranks.
    """
    target = folder / state.name
    temporary = folder / f".{target.name}.{os.getpid()}"
    temporary.mkdir(parents=True)
    try:
        save_file(_tensors_of(network.state_dict()), temporary / _MODEL)
        save_file(_flatten(optimizer), temporary / _OPTIMIZER)
        save_file(generators, temporary / _GENERATORS)
        digests = {path.name: content_hash(path) for path in temporary.iterdir()}
        text = state.model_copy(update={"digests": digests}).model_dump_json(indent=1)
        (temporary / "state.json").write_text(text, encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        _remove(target)
        temporary.rename(target)
        _sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def latest(folder: Path) -> Path | None:
    """The last whole checkpoint in `folder`."""
    return max(folder.glob(_PATTERN), default=None)


def read_state(path: Path) -> State:
    """The JSON part of a checkpoint.

    Raises:
        TrainingError: It cannot be read.
    """
    try:
        return State.model_validate_json((path / "state.json").read_bytes())
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def load(
    path: Path, state: State, network: nn.Module, optimizer: Optimizer, schedule: LRScheduler | None
) -> dict[str, Tensor]:
    """Put a checkpoint's tensors into network, optimizer and schedule; returns the ranks' random generators.

    Raises:
        TrainingError: It cannot be read, is not what was written, or holds another network.
    """
    _load_weights(path, state, network)
    tensors, generators = _read_tensors(path, state, _OPTIMIZER), _read_tensors(path, state, _GENERATORS)
    values: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        place, _, key = name.partition(".")
        values.setdefault(int(place), {})[key] = tensor
    optimizer.load_state_dict({"state": values, "param_groups": state.param_groups})
    if schedule is not None:
        schedule.load_state_dict(state.schedule)
    return generators


def load_weights(path: Path, network: nn.Module) -> None:
    """Put a checkpoint's weights into the network.

    Raises:
        TrainingError: They cannot be read, are not what was written, or belong to another network.
    """
    _load_weights(path, read_state(path), network)


def _load_weights(path: Path, state: State, network: nn.Module) -> None:
    try:
        network.load_state_dict(_read_tensors(path, state, _MODEL))
    except RuntimeError as error:
        raise _unreadable(path, error) from None


def _read_tensors(path: Path, state: State, name: str) -> dict[str, Tensor]:
    try:
        if content_hash(path / name) != state.digests.get(name):
            raise ValueError(f"{name} with another digest than was written")
        return load_file(path / name)
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> TrainingError:
    return TrainingError(
        f"{path}: wanted a checkpoint, seen {one_line(str(error))}; remove the folder to go on without it"
    )


def prune(folder: Path, *, keep: int, best_epoch: int) -> None:
    """Remove all but the last `keep` checkpoints and that behind the best epoch, and what a killed rank left half-written."""
    for path in folder.glob(".epoch-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in sorted(folder.glob(_PATTERN))[:-keep]:
        if path.name != name_of(best_epoch + 1, 0):
            _remove(path)


def _remove(path: Path) -> None:
    """Take the name away first: what is cut short then leaves no folder that looks whole."""
    if path.exists():
        away = path.with_name(f".{path.name}.{os.getpid()}.old")
        path.rename(away)
        shutil.rmtree(away)


def schedule_state(schedule: LRScheduler | None) -> dict[str, Any]:
    """The schedule's state as far as JSON keeps it; mappings with numbers as keys come from the config anyway."""
    state = {} if schedule is None else schedule.state_dict()
    return {key: value for key, value in state.items() if isinstance(value, int | float | str | list | None)}


def param_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The optimizer's hyper-parameters as they stand."""
    groups: list[dict[str, Any]] = optimizer.state_dict()["param_groups"]
    return groups


def _tensors_of(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def _flatten(optimizer: Optimizer) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for place, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            if value is not None:
                found[f"{place}.{key}"] = torch.as_tensor(value)
    return _tensors_of(found)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
