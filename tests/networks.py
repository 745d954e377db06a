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


class _Places(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(width, dtype=torch.int16))

    def forward(self, x_BW: Tensor) -> Tensor:
        return x_BW + self.table / 10


class Placed(nn.Module):
    """A nonlinearity behind places that are shared."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self.places = places

    def forward(self, x_BW: Tensor) -> Tensor:
        """The same shape."""
        return torch.tanh(self.places(x_BW))


class Recurrent(nn.Module):
    """An LSTM over the values of a row, behind batch statistics; submodules take keywords, and give more than a tensor."""

    def __init__(self, contract: Contract, outputs: int) -> None:
        super().__init__()
        width = contract.inputs[0].width
        self.norm, self.lstm = nn.BatchNorm1d(width), nn.LSTM(1, 4, batch_first=True)
        self.head = nn.Linear(4, outputs)

    def forward(self, x_BW: Tensor) -> Tensor:
        """Logits."""
        states_BWH, _ = self.lstm(self.norm(x_BW.float()).unsqueeze(-1))
        logits: Tensor = self.head(input=states_BWH[:, -1])
        return logits


class DoubleLayers(nn.Module):
    """A deeper perceptron in float64 that names its layers, and pairs of them, as `mlp` and `gpt` do.

    `slow` is the number of a layer that takes its time; where it is `tied`, two layers share their weights; with `places`
    all layers share a module that holds integers and learns nothing.
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
        places: bool = False,
    ) -> None:
        super().__init__()
        sizes = [sum(column.width for column in contract.inputs), *[width] * depth]
        layers: list[nn.Module] = [_Joined()]
        shared = _Places(width) if places else None
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), Placed(shared) if shared else nn.Tanh()]
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


class Uneven(nn.Module):
    """A weight that is not contiguous, a layer that is left out by chance, and a buffer that no float32 holds."""

    def __init__(self, contract: Contract, outputs: int) -> None:
        super().__init__()
        width = contract.inputs[0].width
        self.weight = nn.Parameter(torch.randn(outputs, width).t() / width)
        self.sometimes = nn.Linear(width, outputs)
        self.register_buffer("salt", torch.tensor(2654435761))

    def forward(self, x_BW: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = x_BW.float() @ self.weight
        return logits if self.training and torch.rand(()) < 0.5 else logits + self.sometimes(x_BW.float())


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
