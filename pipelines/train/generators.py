"""The random generators of the ranks: seeded by epoch and rank, kept in checkpoints, put back at the same ranks."""

import torch
from torch import Tensor

_PRIMES = 1_000_003, 1_009


def seed_epoch(seed: int, *, epoch: int, rank: int, step: int = 0) -> None:
    """Seed this rank's generators, so that a run that goes on behind an epoch draws what it would have drawn."""
    torch.manual_seed((seed * _PRIMES[0] + epoch + _PRIMES[0] * step) * _PRIMES[1] + rank)


def states(device: torch.device) -> dict[str, Tensor]:
    """The states of this rank's generators."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def put_back(states: dict[str, Tensor], device: torch.device) -> None:
    """Go on drawing from the states."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
