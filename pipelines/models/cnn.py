"""A small convolutional network over one image input."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipelines.errors import ConfigError
from pipelines.lake import Contract


class CNN(nn.Module):
    """3 x 3 convolutions with ReLU, each followed by 2 x 2 max pooling, then one hidden layer.

    Args:
        contract: One image input.
        outputs: K.
        channels: Channels of each convolution.
        hidden: Width of the hidden layer.
        dropout: Share of hidden units set to 0 in training.

    Raises:
        ConfigError: The inputs are not one image, or it is too small to be halved for every convolution.
    """

    def __init__(
        self,
        contract: Contract,
        outputs: int,
        *,
        channels: Sequence[int] = (16, 32),
        hidden: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if [column.kind for column in contract.inputs] != ["image"]:
            raise ConfigError(f"model: cnn takes one image input, seen {[c.kind for c in contract.inputs]}")
        image = contract.inputs[0]
        height, width = image.shape[:2]
        if min(height, width) >> len(channels) < 1:
            raise ConfigError(
                f"model: cnn: channels: an image of {height} x {width} cannot be halved {len(channels)} times"
            )
        depth = image.shape[2] if len(image.shape) == 3 else 1
        layers: list[nn.Module] = []
        for before, after in zip([depth, *channels[:-1]], channels, strict=True):
            layers += [nn.Conv2d(before, after, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.convolutions = nn.Sequential(*layers)
        flat = channels[-1] * (height >> len(channels)) * (width >> len(channels))
        self.hidden = nn.Sequential(nn.Linear(flat, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.head = nn.Linear(hidden, outputs)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Logits of shape (B, K)."""
        (x,) = inputs
        x_BZXY = x.unsqueeze(1) if x.dim() == 3 else torch.movedim(x, -1, 1)
        x_BH = self.hidden(self.convolutions(x_BZXY).flatten(1))
        logits_BK: Tensor = self.head(x_BH)
        return logits_BK
