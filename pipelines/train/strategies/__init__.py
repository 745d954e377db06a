"""Ways of splitting the work, one file each, around the same loop and the same lanes."""

import torch.distributed as dist
from torch import nn

from pipelines.config import strategies as config
from pipelines.train.strategies.base import Setting, Strategy

__all__ = ["Setting", "Strategy", "make_strategy"]


def make_strategy(network: nn.Module, setting: Setting) -> Strategy:
    """The config's strategy on this rank; with one rank there is nothing to share.

    Raises:
        ConfigError: The network does not fit it.
    """
    options = setting.train.strategy
    if dist.get_world_size() == 1:
        return Strategy(network, setting)
    if isinstance(options, config.Sharded):
        from pipelines.train.strategies.sharded import Sharded

        return Sharded(network, setting)
    if isinstance(options, config.TensorParallel):
        from pipelines.train.strategies.tensor_parallel import TensorParallel

        return TensorParallel(network, setting, options)
    if isinstance(options, config.PipelineParallel):
        from pipelines.train.strategies.pipeline_parallel import PipelineParallel

        return PipelineParallel(network, setting, options)
    if isinstance(options, config.Local):
        from pipelines.train.strategies.local_sgd import Local

        return Local(network, setting, options)
    assert isinstance(options, config.DataParallel), "elastic ranks are each alone"
    from pipelines.train.strategies.data_parallel import DataParallel

    return DataParallel(network, setting, options)
