"""A multilayer perceptron over all inputs."""

from collections.abc import Sequence

from torch import Tensor, nn

from pipelines.lake import Contract
from pipelines.models.inputs import InputLayer, stack


class MLP(nn.Module):
    """Linear layers with ReLU.

    Args:
        contract: The inputs.
        outputs: K.
        hidden: Widths of the hidden layers.
        embedding_dim: Width of an id's embedding.
        dropout: Share of hidden units set to 0 in training.
    """

    def __init__(
        self,
        contract: Contract,
        outputs: int,
        *,
        hidden: Sequence[int] = (128,),
        embedding_dim: int = 16,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.inputs = InputLayer(contract, embedding_dim)
        widths = [self.inputs.out_features, *hidden]
        self.hidden = stack(widths, dropout)
        self.head = nn.Linear(widths[-1], outputs)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits of shape (B, K)."""
        x_BF = self.inputs(*inputs)
        logits_BK: Tensor = self.head(self.hidden(x_BF))
        return logits_BK

    def layers_in_order(self) -> Sequence[nn.Module]:
        """See `Layered`."""
        return [self.inputs, *self.hidden, self.head]

    def linear_pairs(self) -> Sequence[tuple[Sequence[str], str]]:
        """See `Paired`."""
        names = [f"hidden.{place}" for place, layer in enumerate(self.hidden) if isinstance(layer, nn.Linear)]
        names.append("head")
        return [([first], second) for first, second in zip(names[::2], names[1::2], strict=False)]
