"""What of a network passes between ranks, counted for the cost model."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from pipelines.models.build import Layered, Paired, learns
from pipelines.train.costs import Size


class _Passed(NamedTuple):
    """Numbers into a layer and out of it, and whether a gradient goes back."""

    given: int
    gives: int
    has_gradient: bool


def size_of(network: nn.Module, inputs: Sequence[Tensor]) -> Size:
    """The size of a whole network, and what its layers and pairs pass on, as a pass of one row has it.

    Args:
        network: On the device of the inputs.
        inputs: Of one row.
    """
    passed: dict[nn.Module, _Passed] = {}

    def see(module: nn.Module, given: tuple[Tensor, ...], gives: Tensor) -> None:
        passed[module] = _Passed(given[0].numel(), gives.numel(), given[0].requires_grad)

    layers, pairs = _layers(network), list(network.linear_pairs()) if isinstance(network, Paired) else []
    paired = [network.get_submodule(name) for columns, rows in pairs for name in (*columns, rows)]
    if seen := {*layers, *paired}:
        was_training = network.training
        handles = [module.register_forward_hook(see) for module in seen]
        network.eval()(*inputs)  # batch statistics want more than a row
        network.train(was_training)
        for handle in handles:
            handle.remove()
    shapes = [parameter.flatten(1).shape if parameter.dim() > 1 else (1, 0) for parameter in network.parameters()]
    thin = sum(rows + columns for rows, columns in shapes if rows * columns > rows + columns)
    summed = _summed(network, pairs, passed)
    sizes = [parameter.numel() for parameter in network.parameters()]
    return Size(
        parameters=sum(sizes),
        tensors=len(sizes),
        thin=thin,
        vectors=sum(sizes) - sum(rows * columns for rows, columns in shapes if rows * columns > rows + columns),
        boundary=max((passed[layer].gives for layer in layers[:-1]), default=0),
        summed=sum(summed),
        sums=len(summed),
    )


def _layers(network: nn.Module) -> list[nn.Module]:
    """Those that hold parameters."""
    layers = network.layers_in_order() if isinstance(network, Layered) else []
    return [layer for layer in layers if learns(layer)]


def _summed(
    network: nn.Module, pairs: Sequence[tuple[Sequence[str], str]], passed: dict[nn.Module, _Passed]
) -> list[int]:
    """What a pair gives is summed forward, the gradient of what each of its first layers takes backward."""
    found = []
    for columns, rows in pairs:
        found.append(passed[network.get_submodule(rows)].gives)
        firsts = [passed[network.get_submodule(name)] for name in columns]
        found += [first.given for first in firsts if first.has_gradient]
    return found
