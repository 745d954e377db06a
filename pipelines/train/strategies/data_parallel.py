"""Data parallel: every rank holds the whole network, gradients are averaged by DistributedDataParallel."""

from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from pipelines.config.strategies import DataParallel as Options
from pipelines.train.checkpoint import Saved
from pipelines.train.strategies.base import Setting, Strategy
from pipelines.train.strategies.hooks import make_hook


class DataParallel(Strategy):
    """Gradients are averaged while the backward pass goes on, as they are or compressed by a hook."""

    parallel: DistributedDataParallel

    def __init__(self, network: nn.Module, setting: Setting, options: Options) -> None:
        self.data_rank, self.data_ranks = dist.get_rank(), dist.get_world_size()
        super().__init__(network, setting)
        self._hook = make_hook(options.hook)
        self.clock.follow(network)

    def _spread(self, network: nn.Module) -> nn.Module:
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=device_ids)

    def _settle(self) -> None:
        """The buckets are laid out behind the first backward pass; only then comes the hook, which keeps things of each.

        The order of a sum over ranks depends on the buckets: a run that goes on from a checkpoint would else differ in
        the last bit from one that was never interrupted.
        """
        super()._settle()
        if self._hook:
            self._hook.register(self.parallel)

    def saved(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """The network from one rank, and what the hook of each rank holds back."""
        kept = self._hook.state() if self._hook else {}
        return super().saved(optimizer) | {f"local.{name}": tensor for name, tensor in kept.items()}

    def load(self, saved: Saved, optimizer: Optimizer) -> None:
        """With what the hook kept back."""
        super().load(saved, optimizer)
        if self._hook and (kept := saved.local()):
            self._hook.load(kept)

    def _exchanging(self, is_last: bool) -> AbstractContextManager[object]:
        return nullcontext() if is_last else self.parallel.no_sync()

    def _scale(self) -> int:
        return self.data_ranks
