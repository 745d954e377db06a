"""The contract's inputs as a network takes them, and as one matrix of features: images flattened, ids embedded."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pipelines.lake import Column, Contract


class InputLayer(nn.Module):
    """Turns the contract's input tensors into `x_BF`.

    A dense input passes, an image is flattened, each column of ids takes an embedding of its own, a sparse input
    becomes the weighted sum of its ids' embeddings, and a sequence their mean, without padding.

    Args:
        contract: Meaning of the tensors.
        embedding_dim: Width of an embedding, E.
    """

    def __init__(self, contract: Contract, embedding_dim: int) -> None:
        super().__init__()
        self.columns = contract.inputs
        self.tables = nn.ModuleDict()
        self.out_features = 0
        for column in self.columns:
            if column.kind == "ids":
                # One table for all columns of the input: ids of column c start at the sizes of those before it.
                self.tables[column.name] = nn.Embedding(sum(column.sizes), embedding_dim)
                offsets = torch.tensor([sum(column.sizes[:place]) for place in range(len(column.sizes))])
                self.register_buffer(f"offsets_{column.name}", offsets, persistent=False)
                self.out_features += len(column.sizes) * embedding_dim
            elif column.kind == "sparse_ids":
                self.tables[column.name] = nn.Embedding(column.sizes[0], embedding_dim)
                self.out_features += embedding_dim
            elif column.kind == "sequence":
                self.tables[column.name] = nn.Embedding(column.sizes[0], embedding_dim, padding_idx=0)
                self.out_features += embedding_dim
            elif column.kind != "sparse_weights":
                self.out_features += column.width

    def forward(self, *inputs: Tensor) -> Tensor:
        """Features of shape (B, out_features)."""
        parts: list[Tensor] = []
        for place, (column, tensor) in enumerate(zip(self.columns, inputs, strict=True)):
            if column.kind == "ids":
                ids_BC = tensor + self.get_buffer(f"offsets_{column.name}")
                parts.append(self.tables[column.name](ids_BC).flatten(1))
            elif column.kind == "sparse_ids":
                weights_BC = inputs[place + 1]
                x_BCE = self.tables[column.name](tensor)
                parts.append((x_BCE * weights_BC.unsqueeze(-1)).sum(1))
            elif column.kind == "sequence":
                num_B1 = (tensor > 0).sum(1, keepdim=True).clamp(min=1)
                parts.append(self.tables[column.name](tensor).sum(1) / num_B1)
            elif column.kind == "image":
                parts.append(tensor.flatten(1))
            elif column.kind == "dense":
                parts.append(tensor)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def scaled(column: Column, tensor: Tensor) -> Tensor:
    """An image's uint8 pixels as float32 in the column's scale; any other tensor, and an image that is scaled, as is."""
    if column.kind != "image" or tensor.dtype != torch.uint8:
        return tensor
    low, high = column.scale
    pixels = tensor.float()
    return torch.add(torch.full((), low, device=pixels.device), pixels, alpha=(high - low) / 255.0, out=pixels)


def stack(widths: Sequence[int], dropout: float) -> nn.Sequential:
    """Linear layers of the given widths with ReLU, and dropout where it is above 0, behind each."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)
