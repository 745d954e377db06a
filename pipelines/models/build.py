"""A network from its name and parameters, what it is trained on, and the form in which it serves."""

import inspect
import math
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.config.base import nearest
from pipelines.config.learning import Model
from pipelines.errors import ConfigError
from pipelines.lake import Contract, LabelSpec
from pipelines.models.inputs import scaled
from pipelines.models.names import network_path


@runtime_checkable
class Ranker(Protocol):
    """A network that says how well an item suits a user, not what the label is, and so has a loss of its own.

    Its outputs are the affinity of a row's user and item, then the vectors whose product it is: shape (B, 1 + 2 D).
    Items are ranked for a user by the products of these vectors.
    """

    def summed_loss(self, outputs: Tensor, inputs: Sequence[Tensor], lane_rows: Sequence[int]) -> Tensor:
        """The sum of the rows' losses, shape (), a function of the rows of each lane, so that ranks do not matter."""


@runtime_checkable
class Layered(Protocol):
    """A network that names the layers which its forward pass goes through one behind the other."""

    def layers_in_order(self) -> Sequence[nn.Module]:
        """The first takes the network's inputs, each other what the one before it gives; one tensor."""


@runtime_checkable
class Paired(Protocol):
    """A network that names pairs of linear layers which can be cut over ranks."""

    def linear_pairs(self) -> Sequence[tuple[Sequence[str], str]]:
        """Names of layers that take the same tensor, and of the one that takes what they give, element by element."""


def learns(module: nn.Module) -> bool:
    """Whether it has parameters."""
    return any(True for _ in module.parameters())


def build_network(model: Model, contract: Contract) -> nn.Module:
    """The network of a config's `model` section, on the CPU, with weights from torch's global generator.

    Raises:
        ConfigError: The class is not there, or it does not take the parameters.
    """
    module, _, name = network_path(model.network).partition(":")
    try:
        cls: Any = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model.network: wanted a class at {module}:{name}, seen {error}") from None
    known = [key for key in inspect.signature(cls).parameters if key not in ("contract", "outputs")]
    for key in model.params:
        if key not in known:
            raise ConfigError(f"model: {model.network} takes {', '.join(known)}, seen {key!r}{nearest(key, known)}")
    try:
        network: nn.Module = cls(contract, contract.label.num_outputs, **model.params)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {model.network}: {error}") from None
    return network


def summed_loss(outputs: Tensor, label: Tensor, spec: LabelSpec, *, weights: Tensor | None = None) -> Tensor:
    """The sum of the rows' losses, shape (): cross entropy, binary cross entropy, of a multilabel label summed over the
    classes, the squared error, or for a count the negative log likelihood of Poisson's distribution without its constant.
    Of a sequence a row's is the mean over its tokens, see `token_losses`.

    A real label is taken in units of its training standard deviation; of a count the output is the logarithm of its
    rate over the training mean.

    Args:
        outputs: Shape (B, K), of a sequence (B, T, K).
        label: Shape (B,), or (B, K) of a multilabel label; of a sequence its ids, (B, T + 1).
        spec: What the label means.
        weights: What a row of each class counts, shape (classes,); None for all alike.
    """
    if spec.kind == "next_token":
        return token_losses(outputs, label).sum()
    weights = None if weights is None else weights.to(outputs.dtype)
    if spec.kind == "multiclass":
        return F.cross_entropy(outputs, label, weight=weights, reduction="sum")
    if spec.kind == "binary":
        of_rows = None if weights is None else weights[label.long()]
        target = label.to(outputs.dtype)
        return F.binary_cross_entropy_with_logits(outputs[:, 0], target, weight=of_rows, reduction="sum")
    if spec.kind == "multilabel":
        return F.binary_cross_entropy_with_logits(outputs, label.to(outputs.dtype), reduction="sum")
    if spec.kind == "count":
        return F.poisson_nll_loss(outputs[:, 0] + math.log(spec.mean), label.to(outputs.dtype), reduction="sum")
    return F.mse_loss(outputs[:, 0], ((label - spec.mean) / spec.std).to(outputs.dtype), reduction="sum")


def row_scores(outputs: Tensor, label: Tensor, spec: LabelSpec) -> Tensor:
    """What is averaged to judge training, shape (B,): 1 where the class is right, the share of a multilabel row's classes
    that are wrong, of a sequence's tokens that are right, or the squared error.
    """
    if spec.kind == "next_token":
        return token_hits(outputs, label)
    if spec.kind == "multiclass":
        return (outputs.argmax(1) == label).to(torch.float32)
    if spec.kind == "binary":
        return ((outputs[:, 0] > 0) == (label > 0)).to(torch.float32)
    if spec.kind == "multilabel":
        return ((outputs >= 0) != (label > 0)).to(torch.float32).mean(dim=1)
    return (predicted(outputs[:, 0].to(torch.float64), spec) - label) ** 2


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """The mean cross entropy of each row's tokens, in nats, shape (B,).

    The first token foretells, and is not foretold; nor is padding. A row without any other counts 0.

    Args:
        logits: Of the id behind each place, shape (B, T, V).
        ids: Shape (B, T + 1).
    """
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return _mean_of_tokens(losses.view(logits.shape[:2]), ids)


def token_hits(logits: Tensor, ids: Tensor) -> Tensor:
    """The share of each row's tokens that were the most likely, shape (B,); see `token_losses`."""
    return _mean_of_tokens((logits.argmax(2) == ids[:, 1:]).to(torch.float32), ids)


def _mean_of_tokens(values: Tensor, ids: Tensor) -> Tensor:
    is_token = ids[:, 1:] != 0
    return (values * is_token).sum(1) / is_token.sum(1).clamp(min=1)


def predicted(outputs: Tensor, spec: LabelSpec) -> Tensor:
    """The numbers that a network's outputs stand for, of the same shape: a label's value, or a count's rate."""
    return torch.exp(outputs) * spec.mean if spec.kind == "count" else outputs * spec.std + spec.mean


class Served(nn.Module):
    """A network with outputs as they are served, its forward's arguments named after the contract's inputs.

    Probabilities of shape (B, classes) for a class label; for a number its value, or its rate, shape (B, 1). Of a
    sequence its loss, the share of its tokens that were hit, and the probabilities of the one behind it, shape (B, 2 + V).
    A Ranker's as they are.
    """

    def __init__(self, network: nn.Module, contract: Contract) -> None:
        super().__init__()
        self.network, self.spec, self.columns = network, contract.label, contract.inputs
        self.as_it_is = isinstance(network, Ranker)

        def forward(*inputs: Tensor) -> Tensor:
            return self._serve(*inputs)

        # torch.export takes the names, and the number, of a program's inputs from this signature.
        names = [inspect.Parameter(c.name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for c in contract.inputs]
        forward.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
        self.forward = forward

    def _serve(self, *inputs: Tensor) -> Tensor:
        outputs = self.network(*map(scaled, self.columns, inputs))
        if self.as_it_is:
            return torch.as_tensor(outputs)
        if self.spec.kind == "next_token":
            scores = [scores_of(outputs, *inputs)[:, None] for scores_of in (token_losses, token_hits)]
            return torch.cat([*scores, self._following(*inputs)], dim=1)
        if self.spec.kind == "multiclass":
            return torch.softmax(outputs, dim=1)
        if self.spec.kind == "binary":
            positive = torch.sigmoid(outputs)
            return torch.cat([1.0 - positive, positive], dim=1)
        if self.spec.kind == "multilabel":
            return torch.sigmoid(outputs)
        return predicted(outputs, self.spec)

    def _following(self, ids: Tensor) -> Tensor:
        """Probabilities of the token behind each sequence, shape (B, V); the first token of a full one makes room for it."""
        ids = torch.where(ids[:, -1:] != 0, F.pad(ids[:, 1:], (0, 1)), ids)
        last = ((ids != 0).sum(1) - 1).clamp(min=0)
        logits_BTV = self.network(ids)
        # Other ways to index the last place tie an exported program to one B.
        of_last = last[:, None, None].expand(-1, 1, logits_BTV.shape[2])
        return torch.softmax(logits_BTV.gather(1, of_last).squeeze(1), dim=1)
