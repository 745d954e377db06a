"""The random generators of the ranks: seeded by epoch and rank, kept in checkpoints, put back at the same ranks."""

import torch
import torch.distributed as dist
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


def gathered(device: torch.device) -> dict[str, Tensor]:
    """The states of all ranks, as `cpu.0`, `cpu.1`, ...; collective."""
    found: dict[str, Tensor] = {}
    for name, state in states(device).items():
        parts = [torch.empty_like(state, device=device) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, state.to(device))
        found |= {f"{name}.{rank}": part.cpu() for rank, part in enumerate(parts)}
    return found


def put_back_gathered(found: dict[str, Tensor], device: torch.device) -> bool:
    """Go on from this rank's states; False where they are those of another number of ranks."""
    if sum(name.startswith("cpu.") for name in found) != dist.get_world_size():
        return False
    mine = f".{dist.get_rank()}"
    put_back({name.removesuffix(mine): state for name, state in found.items() if name.endswith(mine)}, device)
    return True
