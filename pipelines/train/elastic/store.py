"""What a server holds: some of the parameters, and the optimizer that moves them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pipelines.assignment import partition


class Store:
    """Parameters by name, with their optimizer and schedule. Not safe for threads: who calls it sees to that.

    Args:
        held: Parameters and buffers, by name.
        optimizer: Moves the parameters.
        schedule: Of the learning rate.
        clip_grad_norm: The norm to which gradients are clipped, if any.

    Attributes:
        version: Goes up with each update.
    """

    def __init__(
        self,
        held: Mapping[str, Tensor],
        optimizer: Optimizer,
        schedule: LRScheduler | None,
        clip_grad_norm: float | None,
    ) -> None:
        self.held, self.version = dict(held), 0
        self._optimizer, self._schedule, self._clip = optimizer, schedule, clip_grad_norm

    @torch.no_grad()
    def update(self, gradients: Mapping[str, Tensor], *, scale: float = 1.0, norm: float | None = None) -> None:
        """One step of the optimizer by the gradients, times `scale`; other tensors are taken over as they are.

        Args:
            gradients: By name.
            scale: What they count.
            norm: Of the whole gradient, where others hold the rest of it.
        """
        given = {name: gradients[name].to(tensor.device) for name, tensor in self.held.items() if name in gradients}
        moves = {name: gradient * scale for name, gradient in given.items() if self.held[name].requires_grad}
        moved = [self.held[name] for name in moves]
        for name, tensor in given.items():
            if name in moves:
                self.held[name].grad = moves[name]
            else:
                self.held[name].copy_(tensor)
        if self._clip:
            whole = nn.utils.get_total_norm(moves.values()) if norm is None else torch.tensor(norm * scale)
            nn.utils.clip_grads_with_norm_(moved, self._clip, whole)
        self._optimizer.step()
        for tensor in moved:
            tensor.grad = None
        self.version += 1

    def schedule_to(self, step: int) -> None:
        """Have the learning rate that is due once so many global batches of the run are done, in however many updates."""
        while self._schedule is not None and self._schedule.last_epoch < step:
            self._schedule.step()

    def weights(self) -> dict[str, Tensor]:
        """As they are now, copied."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.held.items()}


def names_by_server(held: Mapping[str, Tensor], servers: int) -> list[list[str]]:
    """The names of what each server holds, as even by their bytes as can be; buffers are the first one's."""
    learned = [name for name, tensor in held.items() if tensor.requires_grad]
    server_of = dict(zip(learned, partition([held[name].nbytes for name in learned], servers).agent_of, strict=True))
    return [[name for name in held if server_of.get(name, 0) == server] for server in range(servers)]
