"""Deep learning recommendation model: dot products of embeddings between two perceptrons.

M. Naumov et al., Deep Learning Recommendation Model for Personalization and Recommendation Systems, 2019,
https://arxiv.org/abs/1906.00091.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipelines.errors import ConfigError
from pipelines.lake import Contract
from pipelines.models.inputs import InputLayer, stack


class DLRM(nn.Module):
    """One perceptron makes a vector of all numbers; it and the dot products of every two vectors, that one and the
    ids' embeddings, go through another.

    Args:
        contract: The inputs.
        outputs: K.
        embedding_dim: Width of an id's embedding.
        embedding_std: Standard deviation of embeddings before training; see `InputLayer`.
        bottom: Widths of the hidden layers of the perceptron over numbers.
        hidden: Widths of the hidden layers of the perceptron over dot products.
        dropout: Share of the second perceptron's units set to 0 in training.

    Raises:
        ConfigError: The inputs hold no numbers or no ids.
    """

    def __init__(
        self,
        contract: Contract,
        outputs: int,
        *,
        embedding_dim: int = 16,
        embedding_std: float = 1.0,
        bottom: Sequence[int] = (64,),
        hidden: Sequence[int] = (128, 64),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.inputs = InputLayer(contract, embedding_dim, embedding_std)
        vectors, numbers = self.inputs.num_embeddings, self.inputs.num_numbers
        if not (vectors and numbers):
            raise ConfigError(f"model: dlrm takes numbers and ids, seen {[c.kind for c in contract.inputs]}")
        self.bottom = stack([numbers, *bottom, embedding_dim], 0.0)
        self.register_buffer("pairs", torch.tril_indices(vectors + 1, vectors + 1, -1), persistent=False)
        widths = [embedding_dim + vectors * (vectors + 1) // 2, *hidden]
        self.top = stack(widths, dropout)
        self.head = nn.Linear(widths[-1], outputs)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits of shape (B, K)."""
        numbers, embeddings = self.inputs.split(*inputs)
        x_BE = self.bottom(torch.cat(numbers, dim=1))
        x_BCE = torch.cat([x_BE.unsqueeze(1), *embeddings], dim=1)
        row, column = self.get_buffer("pairs")
        dots_BP = (x_BCE @ x_BCE.transpose(1, 2))[:, row, column]
        logits_BK: Tensor = self.head(self.top(torch.cat([x_BE, dots_BP], dim=1)))
        return logits_BK
