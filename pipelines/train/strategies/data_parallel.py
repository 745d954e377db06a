"""Data parallel: every rank holds the whole network, gradients are averaged by DistributedDataParallel."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def wrap(network: nn.Module, device: torch.device) -> nn.Module:
    """The network with gradients averaged over the ranks; unchanged where there is only one."""
    if dist.get_world_size() == 1:
        return network
    return DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)


def row_weight(*, rows: int, global_rows: int, ranks: int) -> float:
    """The weight of a row's loss on this rank, so that the averaged gradient is that of the global batch's mean loss.

    DistributedDataParallel divides by the world size, whatever rows a rank has; a rank without rows gives 0.
    """
    return ranks / global_rows if rows else 0.0
