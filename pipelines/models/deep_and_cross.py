"""Deep & Cross Network V2: explicit feature crosses beside a multilayer perceptron.

R. Wang et al., DCN V2: Improved Deep & Cross Network, WWW 2021, https://arxiv.org/abs/2008.13535 (parallel form).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipelines.lake import Contract
from pipelines.models.inputs import InputLayer, stack


class DeepAndCross(nn.Module):
    """Cross layers and a perceptron over the same inputs, joined before the head.

    Args:
        contract: The inputs.
        outputs: K.
        embedding_dim: Width of an id's embedding.
        embedding_std: Standard deviation of embeddings before training; see `InputLayer`.
        cross_layers: Number of cross layers, the order of the crosses minus one.
        hidden: Widths of the perceptron's layers.
        dropout: Share of the perceptron's units set to 0 in training.
    """

    def __init__(
        self,
        contract: Contract,
        outputs: int,
        *,
        embedding_dim: int = 16,
        embedding_std: float = 1.0,
        cross_layers: int = 2,
        hidden: Sequence[int] = (128, 64),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.inputs = InputLayer(contract, embedding_dim, embedding_std)
        features = self.inputs.out_features
        self.crosses = nn.ModuleList(nn.Linear(features, features) for _ in range(cross_layers))
        self.deep = stack([features, *hidden], dropout)
        self.head = nn.Linear(features + hidden[-1], outputs)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits of shape (B, K)."""
        x0_BF = self.inputs(*inputs)
        x_BF = x0_BF
        for cross in self.crosses:
            x_BF = x0_BF * cross(x_BF) + x_BF
        logits_BK: Tensor = self.head(torch.cat([x_BF, self.deep(x0_BF)], dim=1))
        return logits_BK
