"""A small decoder of GPT-2's shape, which learns what comes next in a sequence of ids.

A. Radford et al., Language models are unsupervised multitask learners, 2019; sizes, initialization and the lack of
biases are those of https://github.com/karpathy/nanoGPT. The head has weights of its own: a network whose first and last
layer share theirs cannot be cut between ranks.

B batch, T places of the context, D width, H heads, E width of a head, V ids.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.errors import ConfigError
from pipelines.lake import Contract

_STD = 0.02


class GPT(nn.Module):
    """`head(blocks(embed(ids)))`: every layer maps what the one before it gives, so that it is cut anywhere.

    Args:
        contract: One sequence, whose next id is the label.
        outputs: V.
        layers: Number of blocks.
        heads: Of attention, in each block.
        width: D, a multiple of the heads.
        dropout: Share of units set to 0 in training.

    Raises:
        ConfigError: The label is another one, or the width is no multiple of the heads.
    """

    def __init__(
        self,
        contract: Contract,
        outputs: int,
        *,
        layers: int = 4,
        heads: int = 4,
        width: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if contract.label.kind != "next_token":
            raise ConfigError(f"model: gpt: wanted a label of kind next_token, seen {contract.label.kind}")
        if width % heads:
            raise ConfigError(f"model: gpt: width: wanted a multiple of {heads} heads, seen {width}")
        (sequence,) = contract.inputs
        self.embed = Embed(outputs, sequence.width - 1, width, dropout)
        self.blocks = nn.ModuleList(Block(width, width // heads, dropout) for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(width, bias=False), nn.Linear(width, outputs, bias=False))
        self.apply(_initialize)
        for name, weight in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):  # 2 a block add up in what flows past them
                nn.init.normal_(weight, std=_STD / (2 * layers) ** 0.5)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits of the id behind each place, of shape (B, T, V), for ids of shape (B, T + 1)."""
        (ids,) = inputs
        x_BTD = self.embed(ids)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV: Tensor = self.head(x_BTD)
        return logits_BTV

    def layers_in_order(self) -> Sequence[nn.Module]:
        """See `Layered`."""
        return [self.embed, *self.blocks, self.head]

    def linear_pairs(self) -> Sequence[tuple[Sequence[str], str]]:
        """See `Paired`."""
        blocks = [f"blocks.{place}" for place in range(len(self.blocks))]
        heads = [([f"{block}.attention.{name}" for name in "qkv"], f"{block}.attention.proj") for block in blocks]
        return heads + [([f"{block}.mlp.up"], f"{block}.mlp.down") for block in blocks]


class Embed(nn.Module):
    """Ids and their places as vectors; not the last id, which is a target alone."""

    def __init__(self, ids: int, context: int, width: int, dropout: float) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(ids, width), nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """Shape (B, T, D), for ids of shape (B, T + 1)."""
        x_BTD: Tensor = self.dropout(self.token(ids[:, :-1]) + self.place.weight)
        return x_BTD


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and added to what comes in."""

    def __init__(self, width: int, head_width: int, dropout: float) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(width, bias=False), Attention(width, head_width, dropout)
        self.norm_2, self.mlp = nn.LayerNorm(width, bias=False), MLP(width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, T, D), for vectors of the same."""
        x_BTD = x + self.attention(self.norm_1(x))
        y_BTD: Tensor = x_BTD + self.mlp(self.norm_2(x_BTD))
        return y_BTD


class Attention(nn.Module):
    """Causal self-attention. The heads follow from the width of `q` where it runs: a rank may hold some of them."""

    def __init__(self, width: int, head_width: int, dropout: float) -> None:
        super().__init__()
        self.head_width, self.dropout_share = head_width, dropout
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, T, D), for vectors of the same."""
        projected = [linear(x) for linear in (self.q, self.k, self.v)]
        if (width := projected[0].shape[-1]) % self.head_width:
            raise ConfigError(
                f"train.strategy: tensor_parallel: wanted whole heads of {self.head_width} on each rank, seen {width}"
            )
        q_BHTE, k_BHTE, v_BHTE = (x.unflatten(-1, (-1, self.head_width)).transpose(1, 2) for x in projected)
        share = self.dropout_share if self.training else 0.0
        y_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, dropout_p=share, is_causal=True)
        y_BTD: Tensor = self.dropout(self.proj(y_BHTE.transpose(1, 2).flatten(2)))
        return y_BTD


class MLP(nn.Module):
    """Four times as wide inside, with GELU."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(*shape, bias=False) for shape in ((width, 4 * width), (4 * width, width)))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, T, D), for vectors of the same."""
        y_BTD: Tensor = self.dropout(self.down(F.gelu(self.up(x))))
        return y_BTD


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=_STD)
