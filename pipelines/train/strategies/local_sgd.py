"""Local SGD: ranks train alone for some steps, and then put together what they learned.

Averages of weights: S. Stich, Local SGD converges fast and communicates little, ICLR 2019; behind a warm-up with
gradients exchanged at each step: T. Lin et al., Don't use large mini-batches, use local SGD, ICLR 2020. With an outer
optimizer: A. Douillard et al., DiLoCo, 2023, https://arxiv.org/abs/2311.08105.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from pipelines.config import strategies as config
from pipelines.stream import Batch
from pipelines.train import checkpoint
from pipelines.train.checkpoint import Saved
from pipelines.train.strategies.base import Setting, Strategy
from pipelines.train.strategies.groups import sum_gradients


class Local(Strategy):
    """Each rank steps by the mean loss of its own rows; every so many steps the weights are put together.

    A rank counts by the rows that it trained on since, so that uneven lanes do no harm. The optimizer's state stays
    each rank's own.
    """

    def __init__(self, network: nn.Module, setting: Setting, options: config.Local) -> None:
        self.data_rank, self.data_ranks = dist.get_rank(), dist.get_world_size()
        super().__init__(network, setting)
        self._every_steps, self._warmup_steps = options.every_steps, options.warmup_steps
        self._together = [tensor.detach().clone() for tensor in self._averaged()]  # as all ranks had them last
        self._outer = self._outer_optimizer(options) if isinstance(options, config.DiLoCo) else None
        self._steps = self._rows = self._own_rows = self._alone = 0

    def _outer_optimizer(self, options: config.DiLoCo) -> torch.optim.SGD:
        self._together = [tensor.requires_grad_() for tensor in self._together]
        return torch.optim.SGD(
            self._together, lr=options.outer_lr, momentum=options.outer_momentum, nesterov=options.outer_momentum > 0
        )

    def _averaged(self) -> list[Tensor]:
        """What is put together: parameters, and buffers of numbers."""
        return [tensor for tensor in self.held().values() if tensor.is_floating_point()]

    @property
    def _is_warm(self) -> bool:
        return self._steps >= self._warmup_steps

    def step(self, batch: Batch, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Gradients of this rank's mean loss; in the warm-up of the global batch's."""
        self._own_rows = batch.rows
        found = super().step(batch, tensors)
        if not self._is_warm:
            self.clock.enter("communication")
            sum_gradients(self.parameters)
        return found

    def _weight(self, loss: Tensor, global_rows: int) -> Tensor:
        return super()._weight(loss, self._own_rows if self._is_warm and global_rows else global_rows)

    def optimize(self, optimizer: Optimizer) -> None:
        """A rank without rows stays where it is."""
        if self._own_rows or not self._is_warm:
            super().optimize(optimizer)

    def after_step(self, *, is_last: bool) -> None:
        """Put weights together when it is time, and behind each epoch."""
        was_warm = self._is_warm
        self._steps, self._alone, self._rows = self._steps + 1, self._alone + 1, self._rows + self._own_rows
        if not was_warm:
            self.agree()  # as weights do, whenever a checkpoint is left
        if is_last or (self._alone == self._every_steps if was_warm else self._is_warm):
            self.clock.enter("communication")
            self._put_together(self._outer if was_warm else None)
            self._alone = self._rows = 0

    @torch.no_grad()
    def _put_together(self, outer: torch.optim.SGD | None) -> None:
        """Move all ranks to the mean over rows of their weights, or an outer step towards it; one exchange."""
        tensors, share = self._averaged(), self._rows / self.train.batch_size
        moved = [(kept - now).reshape(-1) * share for kept, now in zip(self._together, tensors, strict=True)]
        flat = torch.cat([*moved, moved[0].new_full((1,), share)])
        dist.all_reduce(flat)
        means = torch.split(flat[:-1] / flat[-1], [tensor.numel() for tensor in tensors])
        for kept, mean in zip(self._together, means, strict=True):
            kept.grad = mean.view_as(kept)
            if outer is None:
                kept.sub_(kept.grad)
        if outer is not None:
            outer.step()
        for kept, now in zip(self._together, tensors, strict=True):
            now.copy_(kept)
            kept.grad = None

    @property
    def is_whole(self) -> bool:
        """Behind the step at which weights were put together, and throughout the warm-up."""
        return not self._alone or not self._is_warm

    def saved(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """The network and the outer momentum from one rank, and the optimizer's state of each."""
        held = self.held()
        shared = checkpoint.model_tensors(held)
        for name, kept in zip(self._averaged_names(), self._together, strict=True):
            if self._outer and (momentum := self._outer.state[kept].get("momentum_buffer")) is not None:
                shared[f"outer.{name}"] = momentum
        own = {"steps": torch.tensor(self._steps), **checkpoint.optimizer_tensors(held, optimizer)}
        return self._written(shared) | {f"local.{name}": tensor.detach().cpu() for name, tensor in own.items()}

    def load(self, saved: Saved, optimizer: Optimizer) -> None:
        """Each rank has its own state of the optimizer."""
        held, own = self.held(), saved.local()
        checkpoint.put_back_model(saved, held)
        checkpoint.put_back_optimizer(own, saved.state.param_groups, held, optimizer)
        self._steps = int(own["steps"])
        with torch.no_grad():
            for name, kept, now in zip(self._averaged_names(), self._together, self._averaged(), strict=True):
                kept.copy_(now)
                if self._outer and f"outer.{name}" in saved.names:
                    self._outer.state[kept]["momentum_buffer"] = saved.tensor(f"outer.{name}").to(kept.device)

    def _averaged_names(self) -> list[str]:
        return [name for name, tensor in self.held().items() if tensor.is_floating_point()]
