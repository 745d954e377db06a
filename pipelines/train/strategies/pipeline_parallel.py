"""Pipeline parallel: layers are cut into stages, one a rank, and parts of a batch pass through them one behind the other.

Y. Huang et al., GPipe, NeurIPS 2019; D. Narayanan et al., PipeDream (1F1B), SOSP 2019.
"""

import json
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from pipelines.assignment import cut
from pipelines.config.strategies import PipelineParallel as Options
from pipelines.errors import ConfigError
from pipelines.models.build import Layered, learns
from pipelines.receipt import write_json
from pipelines.stream import Batch
from pipelines.stream.plan import assign_lanes
from pipelines.train import generators
from pipelines.train.objective import Objective
from pipelines.train.strategies.base import Setting, Strategy
from pipelines.train.strategies.groups import clip_global_norm, sum_gradients, two_dimensional

_SCHEDULES = {"1F1B": Schedule1F1B, "GPipe": ScheduleGPipe}
_TIMED = 3  # passes through a layer, of which the shortest counts


class PipelineParallel(Strategy):
    """`size` ranks hold one network together, a run of its layers each; where there are more, groups split the rows.

    Each rank cuts its rows into parts of the same length, the last ones filled up with rows that do not count.

    Attributes:
        stages: The layers of each stage.
        most_live: Parts that this stage held at most, between their forward and their backward pass.

    Raises:
        ConfigError: The network does not name its layers, has too few, or has a loss that needs all rows at once.
    """

    def __init__(self, network: nn.Module, setting: Setting, options: Options) -> None:
        size = options.size or dist.get_world_size()
        self._times_path = setting.layer_times_path
        self._mesh = two_dimensional(setting.device, size=size)
        self._alike = self._mesh["data"].get_group()
        self._place = self._mesh["model"].get_local_rank()
        self.data_rank, self.data_ranks = self._mesh["data"].get_local_rank(), self._mesh["data"].size()
        self.counts = self._place == size - 1
        contract = setting.objective.contract
        inputs = [column.name for column in contract.inputs if self._place == 0]
        self.reads = list(dict.fromkeys([*inputs, *([contract.target] if self.counts else [])]))
        super().__init__(network, setting)
        self.clock.waits_inside = True
        self._schedule = _SCHEDULES[options.schedule](
            self._stage, self.train.num_micro_batches, loss_fn=self._loss, scale_grads=False
        )
        self._labels: dict[str, Tensor] = {}
        self._rows, self._row_weight = 0, 0.0

    @property
    def most_live(self) -> int:
        """See the class."""
        return self._stage.most_live

    def _spread(self, network: nn.Module) -> nn.Module:
        size = self._mesh["model"].size()
        if not isinstance(network, Layered) or self.objective.ranker:
            raise ConfigError(
                "train.strategy: pipeline_parallel: wanted a network that names its layers, such as mlp or gpt; seen "
                f"{type(network).__name__}"
            )
        layers = _units(network.layers_in_order())
        if len(layers) < size:
            raise ConfigError(
                f"train.strategy: pipeline_parallel: wanted a layer with parameters for each of {size} stages, seen "
                f"{len(layers)}"
            )
        num_lanes = len(assign_lanes(self.train.num_lanes, self.data_ranks)[self.data_rank])
        rows = num_lanes * (self.train.batch_size // self.train.num_lanes)
        self._part_rows = -(-rows // self.train.num_micro_batches)
        times, given = self._measured(layers)
        self.stages = cut(self._as_begun(times), size)
        mine = self.stages[self._place]
        run = _Run(layers[mine.start : mine.stop])
        weights = [
            {id(weight) for weight in _Run(layers[stage.start : stage.stop]).parameters()} for stage in self.stages
        ]
        if sum(map(len, weights)) > len(set().union(*weights)):
            raise ConfigError(
                "train.strategy: pipeline_parallel: wanted stages with weights of their own; seen one that two layers share"
            )
        for other in set(_Run(layers).modules()) - set(run.modules()):
            other.to_empty(device="meta", recurse=False)  # other ranks hold it
        # Told what passes between stages, torch does not find it out by a pass over memory as it happens to be.
        self._stage = _Stage(
            _Mixed(run, self.objective),
            self._place,
            size,
            self.device,
            input_args=given[mine.start],
            output_args=given[mine.stop],
            group=self._mesh["model"].get_group(),
        )
        return run

    def _measured(self, layers: Sequence[nn.Module]) -> tuple[list[float], list[tuple[Tensor, ...]]]:
        """Seconds of each layer, forward and backward; and what each takes, and behind the last what it gives, of a part's
        shape.
        """
        times, passed = [], []
        given: tuple[Tensor, ...] = tuple(self.objective.inputs(self.objective.zeros(self._part_rows)))
        for layer in layers:
            layer.eval()  # nothing is drawn, and no batch statistics are kept
            took = []
            for _ in range(_TIMED):
                began = time.perf_counter()
                outputs = layer(*given)
                if outputs.requires_grad:
                    outputs.sum().backward()
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                took.append(time.perf_counter() - began)
            times.append(min(took))
            passed.append(given)
            given = (outputs.detach().requires_grad_(outputs.is_floating_point()),)
            layer.zero_grad()
        return times, [*passed, given]

    def _as_begun(self, times: list[float]) -> list[float]:
        """The layers' times as rank 0 measured them when the job began.

        What goes on is cut as it was: elsewhere, norms would be summed and dropout drawn in another order.
        """
        if dist.get_rank() == 0:
            if self._times_path.is_file():
                times = json.loads(self._times_path.read_bytes())
            else:
                write_json(self._times_path, times)
        told = torch.tensor(times, dtype=torch.float64, device=self.device)
        dist.broadcast(told, 0)
        as_begun: list[float] = told.tolist()
        return as_begun

    def _settle(self) -> None:
        """One step without weight, in which the stages tell each other the shapes of what they send."""
        drawn_from = generators.states(self.device)
        self.network.eval()
        self._pass(self.objective.zeros(), rows=0, weight=0.0)
        self._forget_gradients()
        generators.put_back(drawn_from, self.device)

    def step(self, batch: Batch, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Outputs come from the last stage; gradients are summed over the groups behind the backward pass."""
        self._forget_gradients()
        self.clock.enter("backward")
        if not batch.rows:
            self.network.eval()
        found = self._pass(tensors, rows=batch.rows, weight=1.0 / batch.global_rows)
        self.network.train()
        self.clock.enter("communication")
        sum_gradients(self.parameters, self._mesh["data"].get_group())
        return found

    def evaluate(self, batch: Batch, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """All stages compute; outputs come from the last."""
        return self._pass(tensors, rows=batch.rows, weight=1.0, is_training=False)

    def _pass(
        self, tensors: dict[str, Tensor], *, rows: int, weight: float, is_training: bool = True
    ) -> tuple[Tensor, Tensor] | None:
        self._labels, self._rows, self._row_weight = tensors, rows, weight
        filled = self.train.num_micro_batches * self._part_rows
        given = [_filled_up(x, filled) for x in self.objective.inputs(tensors)] if self._place == 0 else []
        target = torch.arange(filled, device=self.device) if self.counts else None
        outputs = (self._schedule.step if is_training else self._schedule.eval)(*given, target=target)
        if not rows or not self.counts:
            return None
        outputs = outputs.detach()[:rows]
        return outputs, self.objective.loss(outputs, tensors)

    def _loss(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """Of a part, given the numbers of its rows in the batch; what is behind the last row does not count."""
        num = int((rows < self._rows).sum())
        if not num:
            return outputs.sum() * 0.0
        labels = {name: tensor[int(rows[0]) : int(rows[0]) + num] for name, tensor in self._labels.items()}
        return self.objective.loss(outputs[:num], labels) * self._row_weight

    def _clip(self, limit: float) -> None:
        clip_global_norm(self.parameters, limit, copies=lambda _: self.data_ranks)

    def held(self) -> dict[str, Tensor]:
        """Those of this stage's layers."""
        mine = {id(tensor) for tensor in (*self.parallel.parameters(), *self.parallel.buffers())}
        return {name: tensor for name, tensor in super().held().items() if id(tensor) in mine}

    def _writes(self, place: int) -> bool:
        return self.data_rank == 0


class _Run(nn.Module):
    """Layers one behind the other, of which the first may take several tensors."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the last layer gives."""
        for layer in self.layers:
            inputs = (layer(*inputs),)
        return inputs[0]


class _Mixed(nn.Module):
    """A run in the objective's precision, which gives what other stages take."""

    def __init__(self, run: _Run, objective: Objective) -> None:
        super().__init__()
        self.run, self._objective = run, objective

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the run gives."""
        return self._objective.outputs(self.run, *inputs)


class _Stage(PipelineStage):
    """Counts the parts that it holds."""

    most_live = 0

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        """As PipelineStage does."""
        outputs = super().forward_one_chunk(*args, **kwargs)
        self.most_live = max(self.most_live, len(self.fwd_cache))
        return outputs


def _units(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Layers in runs that each begin with one that has parameters, but for what stands in front of the first such."""
    units: list[list[nn.Module]] = [[]]
    for layer in layers:
        if learns(layer) and any(map(learns, units[-1])):
            units.append([])
        units[-1].append(layer)
    return [_Run(unit) for unit in units]


def _filled_up(tensor: Tensor, rows: int) -> Tensor:
    """The first row again behind the last."""
    missing = rows - len(tensor)
    return torch.cat([tensor, tensor[:1].expand(missing, *tensor.shape[1:])]) if missing else tensor
