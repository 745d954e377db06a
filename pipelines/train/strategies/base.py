"""What a strategy is: how ranks share the steps of one training."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from pipelines.config.learning import Train
from pipelines.errors import TrainingError, one_line
from pipelines.stream import Batch
from pipelines.train import checkpoint, generators
from pipelines.train.checkpoint import Saved
from pipelines.train.clock import StepClock
from pipelines.train.objective import Objective
from pipelines.train.strategies.groups import local


@dataclass(frozen=True)
class Setting:
    """What every strategy is given.

    Attributes:
        layer_times_path: Where seconds of the layers are kept; all ranks see it.
    """

    train: Train
    objective: Objective
    device: torch.device
    clock: StepClock
    layer_times_path: Path


@dataclass(frozen=True)
class Part:
    """Rows of a rank's batch that pass through the network together.

    Attributes:
        rows: 0 where `tensors` is one row that does not count, and only keeps collectives aligned.
        lane_rows: How many rows of `tensors` are of each lane.
    """

    tensors: dict[str, Tensor]
    rows: int
    lane_rows: tuple[int, ...]


class Strategy:
    """A rank's share of each step. This is a process alone; the others say what they do otherwise.

    Args:
        network: Whole and the same on all ranks; it may become this rank's share.
        setting: The rest.

    Attributes:
        network: As far as this rank holds it.
        parameters: Those that this rank's optimizer moves.
        data_rank: Which part of the rows this rank reads, of `data_ranks`.
        draws_as: The rank whose random numbers this one draws.
        counts: Whether this rank counts the rows that it reads: of those that read the same, one does.
        reads: The columns that it needs; None for all.
        plain_optimizer: Whether the optimizer must take tensors one by one, since they are of different kinds.
    """

    data_rank, data_ranks = 0, 1
    counts = True
    reads: Sequence[str] | None = None
    plain_optimizer = False
    _alike: dist.ProcessGroup | None = None  # ranks that hold the same buffers; None for all

    def __init__(self, network: nn.Module, setting: Setting) -> None:
        self.network, self.train, self.objective = network, setting.train, setting.objective
        self.device, self.clock = setting.device, setting.clock
        self.draws_as = dist.get_rank()
        self.parallel = self._spread(network)
        if self.train.compile:
            self.parallel.compile()
        self.parameters = [tensor for tensor in self.held().values() if tensor.requires_grad]
        self._weights: dict[float, Tensor] = {}

    def _spread(self, network: nn.Module) -> nn.Module:
        """What a training step calls."""
        return network

    def settle(self) -> None:
        """One pass without weight in front of the first step, which lays out what is laid out once; collective.

        Raises:
            TrainingError: The network cannot be compiled.
        """
        try:
            self._settle()
        except RuntimeError as error:
            if not self.train.compile or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise
            raise TrainingError(
                f"train.compile: wanted a network that torch.compile takes, seen {one_line(str(error), limit=200)}; set "
                "compile: false, or mend that"
            ) from None

    def _settle(self) -> None:
        drawn_from = generators.states(self.device)
        tensors = self.objective.zeros()
        self.network.eval()
        _, loss = self.objective.of(self.parallel, tensors, (1,))
        loss.backward(torch.zeros_like(loss))  # type: ignore[no-untyped-call]
        self._forget_gradients()
        generators.put_back(drawn_from, self.device)

    def step(self, batch: Batch, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Outputs and the summed loss of this rank's rows, and gradients of the global batch's mean loss.

        None where this rank has no outputs.
        """
        parts = list(parts_of(tensors, batch.rows, batch.lane_rows, self.train.num_micro_batches))
        outputs, losses = [], []
        for number, part in enumerate(parts):
            with self._exchanging(number + 1 == len(parts)):
                resting = self._resting(part.rows, is_short=batch.global_rows < self.train.batch_size)
                for module in resting:
                    module.eval()
                self.clock.enter("forward")
                given, loss = self.objective.of(self.parallel, part.tensors, part.lane_rows)
                if not number:
                    self._forget_gradients()
                self.clock.enter("backward")
                loss.backward(self._weight(loss, batch.global_rows if part.rows else 0))  # type: ignore[no-untyped-call]
                for module in resting:
                    module.train()
                if not part.rows:
                    continue
            outputs.append(given)
            losses.append(loss.detach())
        if not outputs:
            return None
        return (outputs[0], losses[0]) if len(outputs) == 1 else (torch.cat(outputs), torch.stack(losses).sum())

    def _resting(self, rows: int, *, is_short: bool) -> list[nn.Module]:
        """What keeps no batch statistics in a step on so many rows: all where none counts; BatchNorm1d, which torch refuses
        to take them of one row, where one is left of a short batch.
        """
        if not rows:
            return [self.network]
        norms = (m for m in self.network.modules() if isinstance(m, nn.BatchNorm1d) and m.training)
        return list(norms) if rows == 1 and is_short else []

    def evaluate(self, batch: Batch, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Outputs and the summed loss of this rank's rows; None where it has none."""
        return self.objective.of(self.network, tensors, batch.lane_rows) if batch.rows else None

    def optimize(self, optimizer: Optimizer) -> None:
        """Move this rank's parameters."""
        if self.train.clip_grad_norm:
            self._clip(self.train.clip_grad_norm)
        optimizer.step()

    def _clip(self, limit: float) -> None:
        """Scale gradients so that the norm of the whole gradient is at most that."""
        nn.utils.clip_grad_norm_(self.parameters, limit)

    def after_step(self, *, is_last: bool) -> None:
        """Behind the optimizer, at every step of an epoch; collective."""

    @property
    def is_whole(self) -> bool:
        """Whether all ranks agree on the weights, so that a checkpoint can be left."""
        return True

    def agree(self) -> None:
        """Take over the first rank's buffers, where each has its own, such as statistics of its rows; collective."""
        if dist.get_world_size(self._alike) > 1:
            for buffer in self.parallel.buffers():
                part = local(buffer)
                part = part.view(-1).view(torch.uint8) if part.is_contiguous() else part  # gloo knows few types
                dist.broadcast(part, group=self._alike, group_src=0)

    def held(self) -> dict[str, Tensor]:
        """Parameters and buffers that this rank holds, by their names in the whole network."""
        return checkpoint.held_by(self.network)

    def saved(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """What this rank writes into a checkpoint; collective."""
        held = self.held()
        return self._written(checkpoint.model_tensors(held) | checkpoint.optimizer_tensors(held, optimizer))

    def _written(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, of those that the ranks share; each is written by one rank. Collective."""
        found = {}
        for place, (name, tensor) in enumerate(tensors.items()):
            whole = checkpoint.whole(tensor)
            if self._writes(place):
                found[name] = whole
        return found

    def _writes(self, place: int) -> bool:
        return dist.get_rank() == 0

    def load(self, saved: Saved, optimizer: Optimizer) -> None:
        """Go on from a checkpoint, of any strategy that shares the same things.

        Raises:
            TrainingError: It is of another network.
        """
        held = self.held()
        checkpoint.put_back_model(saved, held)
        checkpoint.put_back_optimizer(saved.optimizer(), saved.state.param_groups, held, optimizer)

    def _exchanging(self, is_last: bool) -> AbstractContextManager[object]:
        """Around a part of the batch; gradients are exchanged with the last one."""
        return nullcontext()

    def _forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None  # as Optimizer.zero_grad does, without its profiling

    def _weight(self, loss: Tensor, global_rows: int) -> Tensor:
        """What a row's loss counts: such that the gradient is that of the global batch's mean loss, 0 without rows."""
        weight = self._scale() / global_rows if global_rows else 0.0
        if weight not in self._weights:  # all batches but the last have the same
            self._weights[weight] = torch.full_like(loss, weight)
        return self._weights[weight]

    def _scale(self) -> int:
        """By how much the exchange of gradients divides their sum."""
        return 1


def parts_of(tensors: dict[str, Tensor], rows: int, lane_rows: tuple[int, ...], num: int) -> Iterator[Part]:
    """Just `num` parts of a batch, each of consecutive rows; a part without any is one row that does not count.

    Args:
        tensors: Of `rows` rows, or of one where that is 0.
        rows: Of the batch.
        lane_rows: Rows of each lane; kept where the batch is one part.
        num: Parts.
    """
    if num == 1:
        yield Part(tensors, rows, lane_rows)
        return
    for place in range(num):
        start, end = place * rows // num, (place + 1) * rows // num
        part = slice(start, end) if end > start else slice(0, 1)
        yield Part({name: tensor[part] for name, tensor in tensors.items()}, end - start, (max(1, end - start),))
