"""Tensor parallel: a layer's matrix is cut over ranks, and the pair behind it puts the results together.

M. Shoeybi et al., Megatron-LM, 2019, https://arxiv.org/abs/1909.08053: a column-wise cut matrix needs nothing of the
other ranks, the row-wise cut one behind it sums over them, once forward and once backward a pair.
"""

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from pipelines.config.strategies import TensorParallel as Options
from pipelines.errors import ConfigError
from pipelines.models.build import Paired
from pipelines.stream import Batch
from pipelines.train.strategies.base import Setting, Strategy
from pipelines.train.strategies.groups import clip_global_norm, sum_gradients, two_dimensional


class TensorParallel(Strategy):
    """`size` ranks hold one network together and read the same rows; where there are more, groups split the rows.

    Raises:
        ConfigError: The network names no pairs of layers.
    """

    plain_optimizer = True  # cut parameters are DTensors, the others are not

    def __init__(self, network: nn.Module, setting: Setting, options: Options) -> None:
        self._mesh = two_dimensional(setting.device, size=options.size or dist.get_world_size())
        self.data_rank, self.data_ranks = self._mesh["data"].get_local_rank(), self._mesh["data"].size()
        self.counts = self._mesh["model"].get_local_rank() == 0
        super().__init__(network, setting)
        self.draws_as = dist.get_rank() - self._mesh["model"].get_local_rank()  # what is held whole must stay alike
        self.clock.waits_inside = True

    def _spread(self, network: nn.Module) -> nn.Module:
        pairs = list(network.linear_pairs()) if isinstance(network, Paired) else []
        if not pairs:
            raise ConfigError(
                "train.strategy: tensor_parallel: wanted a network with pairs of linear layers to cut, such as mlp or "
                f"gpt; seen {type(network).__name__}"
            )
        plan: dict[str, ParallelStyle] = {}
        size = self._mesh["model"].size()
        for columns, rows in pairs:
            for name in columns:
                if (width := network.get_parameter(f"{name}.weight").shape[0]) % size:
                    raise ConfigError(
                        f"train.strategy: tensor_parallel: wanted layers of a multiple of {size} units, seen {width} in "
                        f"{name}"
                    )
            plan |= dict.fromkeys(columns, ColwiseParallel()) | {rows: RowwiseParallel()}
        return parallelize_module(network, self._mesh["model"], plan)

    def step(self, batch: Batch, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Gradients are summed over the groups behind the backward pass."""
        found = super().step(batch, tensors)
        self.clock.enter("communication")
        sum_gradients(self.parameters, self._mesh["data"].get_group())
        return found

    def _clip(self, limit: float) -> None:
        clip_global_norm(self.parameters, limit, copies=self._copies)

    def _copies(self, parameter: Tensor) -> int:
        is_cut = isinstance(parameter, DTensor) and parameter.placements[0].is_shard()
        return self.data_ranks if is_cut else dist.get_world_size()

    def _writes(self, place: int) -> bool:
        return self.data_rank == 0 and place % self._mesh["model"].size() == self._mesh["model"].get_local_rank()
