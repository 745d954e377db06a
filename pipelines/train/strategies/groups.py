"""Ranks in groups: those that hold one network together, and those that hold the same part of it."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor


def two_dimensional(device: torch.device, *, size: int) -> DeviceMesh:
    """Ranks as (data, model): `size` consecutive ranks hold one network together, and read the same rows."""
    shape = (dist.get_world_size() // size, size)
    return init_device_mesh(device.type, shape, mesh_dim_names=("data", "model"))


def local(tensor: Tensor) -> Tensor:
    """The part that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_gradients(parameters: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Sum gradients over the group, all ranks by default, in one exchange."""
    if dist.get_world_size(group) == 1:
        return
    parts = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    for dtype in dict.fromkeys(part.dtype for part in parts):
        alike = [part for part in parts if part.dtype == dtype]
        flat = torch.cat([part.reshape(-1) for part in alike])
        dist.all_reduce(flat, group=group)
        for part, summed in zip(alike, torch.split(flat, [part.numel() for part in alike]), strict=True):
            part.copy_(summed.view_as(part))


def clip_global_norm(parameters: Sequence[Tensor], limit: float, *, copies: Callable[[Tensor], int]) -> None:
    """Scale gradients so that the norm of all of them, over all ranks, is at most `limit`; collective.

    Args:
        parameters: Those of this rank.
        limit: The norm.
        copies: On how many ranks the same part of a parameter is.
    """
    gradients = [(local(p.grad), copies(p)) for p in parameters if p.grad is not None]
    squares = sum((part.double().square().sum() / num for part, num in gradients), torch.zeros((), dtype=torch.float64))
    dist.all_reduce(squares)
    scale = min(1.0, limit / (float(squares.sqrt()) + 1e-6))
    for part, _ in gradients:
        part.mul_(scale)
