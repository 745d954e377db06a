"""Checkpoints: safetensors and JSON, written whole and then named. No pickle.

A checkpoint is a folder `epoch-0003` with `model.safetensors`, `optimizer.safetensors` and `state.json`. It is
written under another name and renamed when all of it is on disk, so a folder with the name is whole.
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

from pipelines.errors import TrainingError
from pipelines.train.job import EpochResult


class Position(BaseModel):
    """What the order of rows depends on; a checkpoint goes on only where all of it is the same.

    The world size is not part of it: lanes are dealt anew to any number of ranks.
    """

    model_config = ConfigDict(frozen=True)

    snapshot: str
    seed: int
    window: int
    lanes: int
    batch_size: int


class State(BaseModel):
    """The JSON part of a checkpoint.

    Attributes:
        epochs: Results of the epochs so far; the next one is `len(epochs)`.
        best_epoch: The epoch with the best validation metric so far, the last one without validation.
    """

    model_config = ConfigDict(frozen=True)

    position: Position
    epochs: list[EpochResult]
    best_epoch: int
    schedule: dict[str, Any]
    param_groups: list[dict[str, Any]]


def save(folder: Path, network: nn.Module, optimizer: Optimizer, schedule: LRScheduler | None, state: State) -> Path:
    """Write a checkpoint behind epoch `len(state.epochs) - 1`. Returns its folder."""
    target = folder / f"epoch-{len(state.epochs) - 1:04d}"
    temporary = folder / f".{target.name}.{os.getpid()}"
    temporary.mkdir(parents=True)
    try:
        save_file(_tensors_of(network.state_dict()), temporary / "model.safetensors")
        save_file(_flatten(optimizer), temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(state.model_dump_json(indent=1), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        _sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def latest(folder: Path) -> Path | None:
    """The last whole checkpoint in `folder`."""
    return max(folder.glob("epoch-[0-9]*"), default=None)


def load(
    path: Path, network: nn.Module, optimizer: Optimizer, schedule: LRScheduler | None, position: Position
) -> State:
    """Put a checkpoint's tensors into network, optimizer and schedule, and return its state.

    Raises:
        TrainingError: It belongs to another snapshot, seed, lanes or batch, or cannot be read.
    """
    try:
        state = State.model_validate_json((path / "state.json").read_bytes())
        _refuse_mismatch(path, state.position, position)
        load_weights(path, network)
        tensors = load_file(path / "optimizer.safetensors")
    except (OSError, SafetensorError, ValueError) as error:
        raise TrainingError(
            f"{path}: wanted a checkpoint, seen {error}; remove the folder to go on without it"
        ) from None
    values: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        place, _, key = name.partition(".")
        values.setdefault(int(place), {})[key] = tensor
    optimizer.load_state_dict({"state": values, "param_groups": state.param_groups})
    if schedule is not None:
        schedule.load_state_dict(state.schedule)
    return state


def load_weights(path: Path, network: nn.Module) -> None:
    """Put a checkpoint's weights into the network."""
    network.load_state_dict(load_file(path / "model.safetensors"))


def prune(folder: Path, *, keep: int, best_epoch: int) -> None:
    """Remove all but the last `keep` checkpoints and the best one."""
    for path in sorted(folder.glob("epoch-[0-9]*"))[:-keep]:
        if path.name != f"epoch-{best_epoch:04d}":
            shutil.rmtree(path)


def schedule_state(schedule: LRScheduler | None) -> dict[str, Any]:
    """The schedule's state as far as JSON keeps it; mappings with numbers as keys come from the config anyway."""
    state = {} if schedule is None else schedule.state_dict()
    return {key: value for key, value in state.items() if isinstance(value, int | float | str | list | None)}


def param_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The optimizer's hyper-parameters as they stand."""
    groups: list[dict[str, Any]] = optimizer.state_dict()["param_groups"]
    return groups


def _refuse_mismatch(path: Path, seen: Position, wanted: Position) -> None:
    for name, value in wanted:
        if getattr(seen, name) != value:
            raise TrainingError(
                f"{path}: {name}: wanted {value}, the checkpoint has {getattr(seen, name)}; it belongs to another run: "
                "remove the folder to start anew"
            )


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
