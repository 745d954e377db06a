"""What a network that learned a sequence writes by itself."""

import torch
from torch import nn

from pipelines.lake import Contract


@torch.inference_mode()
def sample(network: nn.Module, contract: Contract, *, num: int = 500, temperature: float = 0.8, seed: int) -> list[str]:
    """Tokens drawn one behind the other, each from what the network makes of those before; the first is the most frequent.

    Args:
        network: In evaluation mode; gives logits of shape (B, T, V) for ids of shape (B, T + 1).
        contract: Says what its ids stand for.
        num: How many.
        temperature: Divides the logits: below 1, likely tokens become likelier.
        seed: Of the draws.
    """
    device, context = next(network.parameters()).device, contract.row_outputs
    generator = torch.Generator(device).manual_seed(seed)
    ids = torch.tensor([2], device=device)  # behind padding and what is out of vocabulary
    while len(ids) < num:
        window = ids[-context:]
        row = nn.functional.pad(window, (0, context + 1 - len(window)))
        shares = torch.softmax(network(row[None])[0, len(window) - 1, 2:] / temperature, dim=0)
        ids = torch.cat([ids, torch.multinomial(shares, 1, generator=generator) + 2])
    return [contract.label.classes[place] for place in ids.tolist()]
