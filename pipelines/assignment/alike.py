"""Where agents, or tasks, are alike: lanes to ranks, sizes to parts, layers to pipeline stages."""

from collections.abc import Sequence

import numpy as np

from pipelines.assignment.greedy import longest_first
from pipelines.assignment.programme import Assignment, solve

EXACT_UNKNOWNS = 200  # up to so many, sizes times parts, HiGHS is asked
EXACT_S = 1.0


def balance_lanes(lanes: int, rows_per_s: Sequence[float]) -> list[range]:
    """Lanes of each rank by its speed: the slowest rank's step is as short as can be, and each rank has a lane.

    Lanes are alike, so only their number counts, each rank's are contiguous, and the greedy rule is exact.

    Raises:
        ValueError: There are more ranks than lanes.
    """
    if lanes < len(rows_per_s):
        raise ValueError(f"wanted at least 1 lane a rank, seen {lanes} lanes and {len(rows_per_s)} ranks")
    seconds = np.repeat(1.0 / np.asarray(rows_per_s, dtype=np.float64)[:, None], lanes, axis=1)
    held = np.bincount(longest_first(seconds, at_least=1), minlength=len(rows_per_s))
    return _ranges(np.cumsum(held).tolist())


def partition(sizes: Sequence[float], parts: int) -> Assignment:
    """Sizes to alike parts, such as parameter tensors to servers, the largest part as small as can be (P||Cmax).

    The greedy rule (LPT), then HiGHS for `EXACT_S` seconds where the case is small and the rule did not meet the bound.

    Args:
        sizes: Of the tensors, in any unit.
        parts: How many; some may stay empty where there are fewer sizes.

    Raises:
        ValueError: A size is negative, or there is none, or no part.
    """
    is_small = len(sizes) * parts <= EXACT_UNKNOWNS
    alike = np.repeat(np.asarray(sizes, dtype=np.float64)[None], parts, axis=0)
    return solve(alike, time_limit_s=EXACT_S if is_small else 0)


def cut(costs: Sequence[float], parts: int) -> list[range]:
    """A list of layers in contiguous stages, the longest stage as short as can be.

    By dynamic programming over the first layers and stages, in O(parts * layers^2) (the linear partition problem).

    Args:
        costs: Of each layer, measured, in any unit.
        parts: Stages; each has a layer at least.

    Returns:
        The layers of each stage.

    Raises:
        ValueError: There are fewer layers than stages, no stage, or a cost that is negative or not finite.
    """
    layers, cost = len(costs), np.asarray(costs, dtype=np.float64)
    if not 1 <= parts <= layers or not (np.isfinite(cost) & (cost >= 0)).all():
        raise ValueError(
            f"wanted finite costs of at least 0, and from 1 to {layers} stages for {layers} layers, seen {list(costs)} "
            f"and {parts} stages"
        )
    until = np.append(0.0, np.cumsum(cost))
    between = np.where(np.tri(layers + 1, k=-1, dtype=bool), until[:, None] - until, np.inf)  # [end, start]
    longest, starts = until.copy(), []
    longest[0] = np.inf  # a stage has a layer
    for _ in range(parts - 1):
        table = np.maximum(longest, between)
        starts.append(table.argmin(axis=1))
        longest = table.min(axis=1)
    ends = [layers]
    for start in reversed(starts):
        ends.append(int(start[ends[-1]]))
    return _ranges(ends[::-1])


def _ranges(ends: Sequence[int]) -> list[range]:
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
