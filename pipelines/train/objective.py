"""What is computed from a batch: a network's outputs, and the sum of its rows' losses."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from pipelines.lake import Contract
from pipelines.models.build import Ranker, summed_loss
from pipelines.models.inputs import scaled


class Objective:
    """Outputs and loss of a network on batches of a contract.

    Args:
        network: Says whether its loss is its own.
        contract: Meaning of the tensors.
        device: Where they are.
        class_weights: What a row of each class counts; empty for all alike.
        amp: bf16 autocast, on CUDA devices.
    """

    def __init__(
        self,
        network: nn.Module,
        contract: Contract,
        device: torch.device,
        *,
        class_weights: Sequence[float] = (),
        amp: bool = False,
    ) -> None:
        self.contract, self.device = contract, device
        self.ranker = network if isinstance(network, Ranker) else None
        weights = torch.tensor(class_weights, dtype=torch.float64, device=device)
        self._class_weights = weights if len(weights) else None
        self.is_autocast = amp and device.type == "cuda"

    def inputs(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """What the network takes."""
        return [scaled(column, tensors[column.name]) for column in self.contract.inputs]

    def outputs(self, network: nn.Module, *inputs: Tensor) -> Tensor:
        """What it gives, shape (B, K), of a sequence (B, T, K)."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16) if self.is_autocast else nullcontext():
            outputs: Tensor = network(*inputs)
        return outputs.float() if outputs.dtype == torch.bfloat16 else outputs

    def of(self, network: nn.Module, tensors: Mapping[str, Tensor], lane_rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A network's outputs, and the sum of the rows' losses, shape ()."""
        inputs = self.inputs(tensors)
        outputs = self.outputs(network, *inputs)
        if self.ranker:
            return outputs, self.ranker.summed_loss(outputs, inputs, lane_rows)
        return outputs, self.loss(outputs, tensors)

    def loss(self, outputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The sum of the losses of rows that are each by themselves, shape ()."""
        return summed_loss(outputs, tensors[self.contract.target], self.contract.label, weights=self._class_weights)

    def zeros(self, rows: int = 1) -> dict[str, Tensor]:
        """Rows of zeros, by column."""
        return {
            c.name: torch.zeros((rows, *c.shape), dtype=getattr(torch, c.dtype), device=self.device)
            for c in self.contract.columns
        }
