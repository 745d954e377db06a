"""Softmax regression: one linear map of all inputs."""

from torch import Tensor, nn

from pipelines.lake import Contract
from pipelines.models.inputs import InputLayer


class Softmax(nn.Module):
    """A linear map of dense inputs and images, and a weight an id and output."""

    def __init__(self, contract: Contract, outputs: int) -> None:
        super().__init__()
        self.inputs = InputLayer(contract, embedding_dim=outputs)
        self.linear = nn.Linear(self.inputs.out_features, outputs)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits of shape (B, K)."""
        logits_BK: Tensor = self.linear(self.inputs(*inputs))
        return logits_BK
