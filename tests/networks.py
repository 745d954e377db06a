"""Networks that a config names by dotted path."""

import time
from itertools import pairwise

import torch
from torch import Tensor, nn

from pipelines.lake import Contract
from pipelines.models.gpt import GPT
from pipelines.models.two_tower import TwoTower


class Double(nn.Module):
    """A perceptron in float64, for comparisons near its rounding."""

    def __init__(self, contract: Contract, outputs: int, *, hidden: int = 8) -> None:
        super().__init__()
        width = sum(column.width for column in contract.inputs)
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, outputs)).double()

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.layers(torch.cat([x.double() for x in inputs], dim=1))
        return logits


class _Joined(nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.cat([x.double() for x in inputs], dim=1)


class DoubleLayers(nn.Module):
    """A deeper perceptron in float64 that names its layers, and pairs of them, as `mlp` and `gpt` do.

    `slow` is the number of a layer that takes its time; where it is `tied`, two layers share their weights.
    """

    def __init__(
        self,
        contract: Contract,
        outputs: int,
        *,
        width: int = 8,
        depth: int = 3,
        slow: int | None = None,
        tied: bool = False,
    ) -> None:
        super().__init__()
        sizes = [sum(column.width for column in contract.inputs), *[width] * depth]
        layers: list[nn.Module] = [_Joined()]
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.Tanh()]
        self.body, self.head = nn.Sequential(*layers, nn.LayerNorm(width)).double(), nn.Linear(width, outputs).double()
        if tied:
            layers[5].weight = layers[3].weight
        if slow is not None:
            self.body[slow].register_forward_pre_hook(lambda *_: time.sleep(0.05))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits."""
        x_BW = self.body[0](*inputs)
        for layer in self.body[1:]:
            x_BW = layer(x_BW)
        logits: Tensor = self.head(x_BW)
        return logits

    def layers_in_order(self) -> list[nn.Module]:
        """See `Layered`."""
        return [*self.body, self.head]

    def linear_pairs(self) -> list[tuple[list[str], str]]:
        """See `Paired`."""
        return [(["body.1"], "body.3")]


class DoubleTied(nn.Module):
    """Two layers in float64 that are one, which has a name or two."""

    def __init__(self, contract: Contract, outputs: int, *, named_twice: bool) -> None:
        super().__init__()
        width = sum(column.width for column in contract.inputs)
        self.first, self.head = nn.Linear(width, width).double(), nn.Linear(width, outputs).double()
        if named_twice:
            self.second = self.first

    def forward(self, x_BW: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.first(torch.tanh(self.first(x_BW.double()))))
        return logits


class Normalized(nn.Module):
    """A linear map behind batch normalization of a grey image."""

    def __init__(self, contract: Contract, outputs: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm2d(1), nn.Linear(contract.inputs[0].width, outputs)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.linear(self.norm(inputs[0].float().unsqueeze(1)).flatten(1))
        return logits


class DoubleTowers(TwoTower):
    """Two towers in float64."""

    def __init__(self, contract: Contract, outputs: int, *, temperature: float | None = None) -> None:
        super().__init__(contract, outputs, embedding_dim=5, width=4, hidden=[6], temperature=temperature)
        self.double()


class DoubleDecoder(GPT):
    """A decoder of two blocks in float64."""

    def __init__(self, contract: Contract, outputs: int) -> None:
        super().__init__(contract, outputs, layers=2, heads=4, width=8)
        self.double()
