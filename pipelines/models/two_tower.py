"""Two towers: a user's vector and an item's, whose product says how well the item suits the user.

X. Yi et al., Sampling-bias-corrected neural modeling for large corpus item recommendations, RecSys 2019,
https://doi.org/10.1145/3298689.3346996. The towers are those of P. Huang et al., Learning deep structured semantic
models for web search using clickthrough data, CIKM 2013.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.errors import ConfigError
from pipelines.lake import Contract
from pipelines.models.inputs import InputLayer, stack


class TwoTower(nn.Module):
    """A perceptron over a user's inputs, another over an item's; every training row is a choice, whatever its label.

    The loss is the cross entropy of a row's item among the items of its lane's rows in the batch, each affinity less
    the logarithm of the item's share of the training rows: frequent items stand in more batches. Other rows of the
    same item are left out.

    Args:
        contract: With users and items.
        outputs: Not read.
        user: Inputs of the user's tower beside the users themselves; alike in all rows of a user.
        item: Inputs of the item's tower, likewise. An input of neither is not read.
        embedding_dim: Width of an id's embedding.
        embedding_std: Standard deviation of embeddings before training; see `InputLayer`.
        hidden: Widths of each tower's hidden layers.
        width: Of the vectors, D.
        temperature: Divides the product of vectors of length 1. None: the product of vectors of any length.
        dropout: Share of hidden units set to 0 in training.

    Raises:
        ConfigError: There are no users and items, or an input is not there or in both towers.
    """

    def __init__(
        self,
        contract: Contract,
        outputs: int,
        *,
        user: Sequence[str] = (),
        item: Sequence[str] = (),
        embedding_dim: int = 32,
        embedding_std: float = 0.1,
        hidden: Sequence[int] = (),
        width: int = 32,
        temperature: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if (recommended := contract.recommended) is None:
            raise ConfigError(
                "model: two_tower: wanted the section `recommend`, which names users and items; seen none"
            )
        towers = [[recommended.user, *user], [recommended.item, *item]]
        if both := set(towers[0]) & set(towers[1]):
            raise ConfigError(f"model: two_tower: wanted an input in one tower, seen {sorted(both)} in both")
        self.temperature = temperature
        self.user_places, self.item_places = (
            [p for name in names for p in _places(contract, name)] for names in towers
        )
        self.user, self.item = (
            _Tower(_only(contract, places), embedding_dim, embedding_std, [*hidden, width], dropout)
            for places in (self.user_places, self.item_places)
        )
        counts = torch.tensor(recommended.item_counts, dtype=torch.float64).clamp(min=1.0)
        self.register_buffer("log_share", torch.log(counts / counts.sum()), persistent=False)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Affinities, then the users' and the items' vectors, of shape (B, 1 + 2 D)."""
        user_BD = self.user(*[inputs[place] for place in self.user_places])
        item_BD = self.item(*[inputs[place] for place in self.item_places])
        if self.temperature is not None:
            user_BD, item_BD = (F.normalize(x_BD) / self.temperature**0.5 for x_BD in (user_BD, item_BD))
        return torch.cat([(user_BD * item_BD).sum(1, keepdim=True), user_BD, item_BD], dim=1)

    def summed_loss(self, outputs: Tensor, inputs: Sequence[Tensor], lane_rows: Sequence[int]) -> Tensor:
        """The sum of the rows' losses, shape (); see `Ranker`.

        Args:
            outputs: Shape (B, 1 + 2 D).
            inputs: What `forward` took.
            lane_rows: Rows of each lane; B together.
        """
        item_B = inputs[self.item_places[0]][:, 0]
        log_share_B = self.get_buffer("log_share")[item_B].to(outputs.dtype)
        user_BD, item_BD = outputs[:, 1:].chunk(2, dim=1)
        rows = [num for num in lane_rows if num]
        lanes = zip(*(torch.split(x, rows) for x in (user_BD, item_BD, item_B, log_share_B)), strict=True)
        return torch.stack([_loss_among(*lane) for lane in lanes]).sum()


class _Tower(nn.Module):
    """A perceptron over some inputs whose last layer is linear; its widths are those of the layers behind the inputs."""

    def __init__(
        self, contract: Contract, embedding_dim: int, std: float, widths: Sequence[int], dropout: float
    ) -> None:
        super().__init__()
        self.inputs = InputLayer(contract, embedding_dim, std)
        hidden = [self.inputs.out_features, *widths[:-1]]
        self.hidden, self.last = stack(hidden, dropout), nn.Linear(hidden[-1], widths[-1])

    def forward(self, *inputs: Tensor) -> Tensor:
        """Vectors of shape (B, D)."""
        vector_BD: Tensor = self.last(self.hidden(self.inputs(*inputs)))
        return vector_BD


def _loss_among(user: Tensor, item: Tensor, ids: Tensor, log_share: Tensor) -> Tensor:
    """The summed cross entropy of each row's item among those of all rows, shape ().

    Args:
        user: Vectors of shape (L, D).
        item: Likewise.
        ids: Of the items, shape (L,).
        log_share: Likewise.
    """
    logits_LL = user @ item.T - log_share
    is_other = ~torch.eye(len(ids), dtype=torch.bool, device=ids.device)
    logits_LL = logits_LL.masked_fill((ids == ids[:, None]) & is_other, float("-inf"))
    return F.cross_entropy(logits_LL, torch.arange(len(ids), device=ids.device), reduction="sum")


def _places(contract: Contract, name: str) -> list[int]:
    """Where an input's columns stand among the contract's; two of a sparse one."""
    found = [place for place, column in enumerate(contract.inputs) if column.input == name]
    if not found:
        known = ", ".join(column.name for column in contract.inputs)
        raise ConfigError(f"model: two_tower: wanted an input among {known}, seen {name!r}")
    return found


def _only(contract: Contract, places: Sequence[int]) -> Contract:
    return contract.model_copy(update={"columns": tuple(contract.inputs[place] for place in places)})
