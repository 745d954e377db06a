"""Sharded: each rank holds 1/ranks of parameters, gradients and optimizer state (FSDP2).

S. Rajbhandari et al., ZeRO: Memory optimizations toward training trillion parameter models, SC 2020; Y. Zhao et al.,
PyTorch FSDP, VLDB 2023. A layer's parameters are gathered when it computes, and let go behind it.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from pipelines.models.build import Layered, learns
from pipelines.stream import Batch
from pipelines.train.strategies.base import Setting, Strategy
from pipelines.train.strategies.groups import clip_global_norm


class Sharded(Strategy):
    """Rows are split as in data parallel; a network's layers, where it names them, are gathered one by one."""

    def __init__(self, network: nn.Module, setting: Setting) -> None:
        self.data_rank, self.data_ranks = dist.get_rank(), dist.get_world_size()
        super().__init__(network, setting)
        self.clock.waits_inside = True

    def _spread(self, network: nn.Module) -> nn.Module:
        mesh = init_device_mesh(self.device.type, (self.data_ranks,))
        is_mixed = self.objective.is_autocast
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if is_mixed else MixedPrecisionPolicy()
        for layer in network.layers_in_order() if isinstance(network, Layered) else ():
            if learns(layer):
                fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(network, mesh=mesh, mp_policy=policy)
        return network

    def evaluate(self, batch: Batch, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """All ranks compute, since they gather layers together; one without rows has no outputs."""
        found = self.objective.of(self.network, tensors, batch.lane_rows)
        return found if batch.rows else None

    def _clip(self, limit: float) -> None:
        clip_global_norm(self.parameters, limit, copies=lambda _: 1)

    def _writes(self, place: int) -> bool:
        return place % self.data_ranks == self.data_rank

    def _exchanging(self, is_last: bool) -> AbstractContextManager[object]:
        assert isinstance(self.network, FSDPModule)
        self.network.set_requires_gradient_sync(is_last)
        return nullcontext()

    def _scale(self) -> int:
        return self.data_ranks
