"""The contract's inputs as a network takes them, and as one matrix of features: images flattened, ids embedded."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pipelines.lake import Column, Contract


class InputLayer(nn.Module):
    """Turns the contract's input tensors into `x_BF`, numbers before embeddings.

    A dense input passes, an image is flattened, each column of ids takes an embedding of its own, a sparse input
    becomes the weighted sum of its ids' embeddings, and a sequence their mean, without padding.

    Args:
        contract: Meaning of the tensors.
        embedding_dim: Width of an embedding, E.
        embedding_std: Standard deviation of the embeddings before training. What rare ids begin with stays in them, as
            noise: with many of those, far less than torch's 1.
    """

    def __init__(self, contract: Contract, embedding_dim: int, embedding_std: float = 1.0) -> None:
        super().__init__()
        self.columns = contract.inputs
        self.tables = nn.ModuleDict()
        self.num_numbers = self.num_embeddings = 0
        for column in self.columns:
            if column.kind == "ids":
                # One table for all columns of the input: ids of column c start at the sizes of those before it.
                self.tables[column.name] = _embedding(sum(column.sizes), embedding_dim, embedding_std)
                offsets = torch.tensor([sum(column.sizes[:place]) for place in range(len(column.sizes))])
                self.register_buffer(f"offsets_{column.name}", offsets, persistent=False)
                self.num_embeddings += len(column.sizes)
            elif column.kind == "sparse_ids":
                self.tables[column.name] = _embedding(column.sizes[0], embedding_dim, embedding_std)
                self.num_embeddings += 1
            elif column.kind == "sequence":
                self.tables[column.name] = _embedding(column.sizes[0], embedding_dim, embedding_std, padding=0)
                self.num_embeddings += 1
            elif column.kind != "sparse_weights":
                self.num_numbers += column.width
        self.out_features = self.num_numbers + self.num_embeddings * embedding_dim

    def forward(self, *inputs: Tensor) -> Tensor:
        """Features of shape (B, out_features)."""
        numbers, embeddings = self.split(*inputs)
        parts = [*numbers, *(x_BCE.flatten(1) for x_BCE in embeddings)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def split(self, *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Numbers, each of shape (B, width), and embeddings, each of shape (B, C, E), in the order of the inputs."""
        numbers: list[Tensor] = []
        embeddings: list[Tensor] = []
        for place, (column, tensor) in enumerate(zip(self.columns, inputs, strict=True)):
            if column.kind == "ids":
                ids_BC = tensor + self.get_buffer(f"offsets_{column.name}")
                embeddings.append(self.tables[column.name](ids_BC))
            elif column.kind == "sparse_ids":
                weights_BC = inputs[place + 1]
                x_BCE = self.tables[column.name](tensor)
                embeddings.append((x_BCE * weights_BC.unsqueeze(-1)).sum(1, keepdim=True))
            elif column.kind == "sequence":
                num_B11 = (tensor > 0).sum(1).clamp(min=1).view(-1, 1, 1)
                embeddings.append(self.tables[column.name](tensor).sum(1, keepdim=True) / num_B11)
            elif column.kind == "image":
                numbers.append(tensor.flatten(1))
            elif column.kind == "dense":
                numbers.append(tensor)
        return numbers, embeddings


def _embedding(ids: int, dim: int, std: float, padding: int | None = None) -> nn.Embedding:
    table = nn.Embedding(ids, dim, padding_idx=padding)
    with torch.no_grad():
        table.weight.mul_(std)
    return table


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
