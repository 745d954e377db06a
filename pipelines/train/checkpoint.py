"""Checkpoints: safetensors and JSON, written whole and then named. No pickle.

A checkpoint is a folder `epoch-0003-step-00000120` with `state.json` and a file a rank, `rank-0.safetensors`, ...:
training goes on from it at step 120 of epoch 3. It is written under another name and renamed when all of it is on disk,
so a folder with the name is whole.

Tensors of the network and its optimizer have their whole shapes, and the names that they have in the whole network,
`model.<name>` and `optimizer.<name>.<key>`, in whichever file: a checkpoint fits any number of ranks, and any strategy
that learns the same. What is a rank's own is in its file: `rng.<device>`, and `local.<name>` where a strategy has such.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipelines.errors import TrainingError, one_line
from pipelines.receipt import content_hash
from pipelines.train.job import EpochResult, checkpoints
from pipelines.train.tally import Sums


class State(BaseModel):
    """The JSON part of a checkpoint.

    Attributes:
        loader: The LaneLoader's state: what the order of rows depends on, and the epoch and step to go on with.
        sums: Of the rows that this epoch has trained on.
        seconds: Time that this epoch has taken.
        epochs: Results of the epochs that are done.
        best_epoch: The one with the best validation metric so far, the last one without validation.
        ledger: Where parts of an epoch are not done in order, those that are left, and which of these a server has learned
            from by then.
        digests: sha256 of the ranks' files.
    """

    model_config = ConfigDict(frozen=True)

    loader: dict[str, Any]
    sums: Sums
    seconds: float
    epochs: list[EpochResult]
    best_epoch: int
    schedule: dict[str, Any]
    param_groups: list[dict[str, Any]]
    ledger: dict[str, Any] | None = None
    digests: dict[str, str] = {}

    @property
    def name(self) -> str:
        """The checkpoint's folder."""
        return name_of(self.loader["epoch"], self.loader["step"])


def name_of(epoch: int, step: int) -> str:
    """The folder of the checkpoint from which training goes on at that step."""
    return f"epoch-{epoch:04d}-step-{step:08d}"


def save(folder: Path, state: State, tensors: Mapping[str, Tensor]) -> Path:
    """Write a checkpoint; collective where torch.distributed is initialized. Returns its folder.

    Args:
        folder: The job's, which all ranks see.
        state: The JSON part; rank 0's counts.
        tensors: What this rank writes.
    """
    target, rank = folder / state.name, _rank()
    temporary = folder / f".{target.name}"
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    _meet()
    path = temporary / _file_of(rank)
    save_file({name: _plain(tensor) for name, tensor in tensors.items()}, path)
    _sync(path)
    digests = _gathered_digests(content_hash(path))
    if rank == 0:
        state = state.model_copy(update={"digests": {_file_of(r): digest for r, digest in enumerate(digests)}})
        (temporary / "state.json").write_text(state.model_dump_json(indent=1), encoding="utf-8")
        for written in (temporary / "state.json", temporary):
            _sync(written)
        _remove(target)
        temporary.rename(target)
        _sync(folder)
    return target


class Saved:
    """A checkpoint on disk, of which each file is what was written. A tensor is read when it is asked for.

    Args:
        path: Its folder.

    Attributes:
        state: The JSON part.
        names: Of the tensors that the ranks share.

    Raises:
        TrainingError: It cannot be read, or is not what was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.state = State.model_validate_json((path / "state.json").read_bytes())
            self._files = {name: _opened(path / name, digest) for name, digest in self.state.digests.items()}
        except (OSError, ValueError, SafetensorError) as error:
            raise self.unreadable(error) from None
        self._file_of = {
            name: file
            for file in self._files.values()
            for name in _names(file)
            if not name.startswith(("rng.", "local."))
        }
        self.names = self._file_of.keys()

    def tensor(self, name: str) -> Tensor:
        """A tensor that the ranks share."""
        if name not in self._file_of:
            raise self.unreadable(ValueError(f"no {name}"))
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def optimizer(self) -> dict[str, Tensor]:
        """The optimizer's state, `optimizer.<name>.<key>`."""
        return {name: self.tensor(name) for name in self.names if name.startswith("optimizer.")}

    def generators(self, rank: int) -> dict[str, Tensor] | None:
        """The states of a rank's random generators; None where the checkpoint is of another number of ranks."""
        return self._own("rng.", rank) if len(self.state.digests) == _world() else None

    def local(self) -> dict[str, Tensor]:
        """What is this rank's own; only strategies leave it whose jobs are of one number of ranks."""
        return self._own("local.", _rank())

    def _own(self, prefix: str, rank: int) -> dict[str, Tensor]:
        file = self._files[_file_of(rank)]
        return {key.removeprefix(prefix): file.get_tensor(key) for key in _names(file) if key.startswith(prefix)}

    def unreadable(self, error: Exception) -> TrainingError:
        """What to tell of it."""
        return TrainingError(
            f"{self.path}: wanted a checkpoint, seen {one_line(str(error))}; remove the folder to go on without it"
        )


def load_weights(path: Path, network: nn.Module) -> None:
    """Put a checkpoint's weights into a network.

    Raises:
        TrainingError: They cannot be read, are not what was written, or belong to another network.
    """
    put_back_model(Saved(path), held_by(network))


def held_by(network: nn.Module) -> dict[str, Tensor]:
    """A network's parameters and buffers by name, one that has several names by the first."""
    first: dict[int, str] = {}
    held: dict[str, Tensor] = network.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in held.items() if first.setdefault(id(tensor), name) == name}


def model_tensors(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers by their names in a checkpoint."""
    return {f"model.{name}": tensor.detach() for name, tensor in held.items()}


def optimizer_tensors(held: Mapping[str, Tensor], optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by its names in a checkpoint."""
    found = {}
    for name, parameter in held.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                found[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
    return found


def whole(tensor: Tensor) -> Tensor:
    """A tensor in its whole shape; collective over the ranks that share it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put_back_model(saved: Saved, held: Mapping[str, Tensor]) -> None:
    """Put weights where they are held.

    Raises:
        TrainingError: They belong to another network.
    """
    for name, tensor in held.items():
        value = saved.tensor(f"model.{name}")
        if value.shape != tensor.shape:
            raise saved.unreadable(
                ValueError(f"{name} of shape {tuple(value.shape)} in place of {tuple(tensor.shape)}: another network")
            )
        tensor.copy_(_laid_out(value, tensor))


def put_back_optimizer(
    values: Mapping[str, Tensor], groups: list[dict[str, Any]], held: Mapping[str, Tensor], optimizer: Optimizer
) -> None:
    """Put an optimizer's state where it is held.

    Args:
        values: `optimizer.<name>.<key>`.
        groups: Hyper-parameters of its groups, of which there is one.
        held: Parameters by name, of which the optimizer moves some.
        optimizer: It.
    """
    by_name: dict[str, dict[str, Tensor]] = {}
    for full_name, value in values.items():
        name, _, key = full_name.removeprefix("optimizer.").rpartition(".")
        by_name.setdefault(name, {})[key] = value
    names = {id(parameter): name for name, parameter in held.items()}
    moved = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        place: {key: _laid_out(value, parameter) for key, value in by_name[names[id(parameter)]].items()}
        for place, parameter in enumerate(moved)
        if names[id(parameter)] in by_name
    }
    here = optimizer.param_groups[0]
    how: dict[str, Any] = {
        key: here[key] for key in ("fused", "foreach") if key in here
    }  # of this strategy, not of that which saved
    group = {**groups[0], **how, "params": [*range(len(moved))]}
    optimizer.load_state_dict({"state": state, "param_groups": [group]})


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor cut as `like` is, where that is cut."""
    if isinstance(like, DTensor) and value.shape == like.shape:
        on_device = value.to(like.to_local().device)
        return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)
    return value


def prune(folder: Path, *, keep: int, best_epoch: int) -> None:
    """Remove all but the last `keep` checkpoints and that behind the best epoch, and what a killed rank left half-written."""
    for path in folder.glob(".epoch-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in checkpoints(folder)[:-keep]:
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
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _meet() -> None:
    if _world() > 1:
        dist.barrier()


def _gathered_digests(digest: str) -> list[str]:
    """Those of all ranks; once it is back, all ranks have written theirs."""
    if _world() == 1:
        return [digest]
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    mine = torch.frombuffer(bytearray(bytes.fromhex(digest)), dtype=torch.uint8).to(device)
    parts = [torch.empty_like(mine) for _ in range(_world())]
    dist.all_gather(parts, mine)
    return [bytes(part.tolist()).hex() for part in parts]


def _file_of(rank: int) -> str:
    return f"rank-{rank}.safetensors"


def _opened(path: Path, digest: str) -> Any:
    if content_hash(path) != digest:
        raise ValueError(f"{path.name} with another digest than was written")
    return safe_open(path, "pt")


def _names(file: Any) -> list[str]:
    names: list[str] = file.keys()
    return names


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
