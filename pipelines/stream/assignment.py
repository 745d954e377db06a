"""Which rank reads which lanes where ranks differ: a 0/1 programme, solved by HiGHS, with a greedy rule beside it.

With t_ij the seconds that rank i needs for lane j, and x_ij whether it gets it, either the makespan
max_i sum_j t_ij x_ij is least, or the sum of t_ij x_ij under capacities (the generalized assignment problem).
Lanes of one table are alike, t_ij = t_i: for those the greedy rule is exact, and takes no time from training.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
TIME_LIMIT_S = 1.0


def balance_lanes(lanes: int, rows_per_s: Sequence[float]) -> list[range]:
    """Lanes of each rank by its speed: the slowest rank's step is as short as can be, and each rank has a lane.

    Lanes are alike, so only their number counts, and each rank's are contiguous.

    Raises:
        ValueError: There are more ranks than lanes.
    """
    seconds = np.repeat(1.0 / np.asarray(rows_per_s, dtype=np.float64)[:, None], lanes, axis=1)
    rank_of = _longest_first(seconds, at_least=1)
    ends = np.cumsum(np.bincount(rank_of, minlength=len(rows_per_s))).tolist()
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def makespan(seconds: Matrix, rank_of: Sequence[int]) -> float:
    """The time of the rank that takes longest."""
    load = np.zeros(len(seconds))
    for lane, rank in enumerate(rank_of):
        load[rank] += seconds[rank, lane]
    return float(load.max())


def solve(
    seconds: Matrix,
    *,
    minimize: Literal["makespan", "sum"] = "makespan",
    capacity: Sequence[float] | None = None,
    use: Matrix | None = None,
    at_least: int = 0,
    time_limit_s: float = TIME_LIMIT_S,
) -> list[int]:
    """The rank of each lane.

    Args:
        seconds: t_ij, of shape (ranks, lanes).
        minimize: The makespan, or the sum.
        capacity: What each rank holds at most; None: no limit.
        use: What a lane takes of it, of shape (ranks, lanes); 1 by default.
        at_least: Lanes that each rank gets.
        time_limit_s: For the solver; then the best found so far, or the greedy rule's, is taken.

    Raises:
        ValueError: The capacities cannot hold the lanes.
    """
    greedy = _longest_first(seconds, at_least)
    use = np.ones_like(seconds) if use is None else use
    exact = _milp(seconds, minimize, capacity, use, at_least, time_limit_s)
    if minimize == "sum" or capacity is not None:
        if exact is None:
            raise ValueError(
                f"no assignment of {seconds.shape[1]} lanes to {len(seconds)} ranks was found within the capacities {capacity}"
            )
        return exact
    return greedy if exact is None else min(exact, greedy, key=lambda rank_of: makespan(seconds, rank_of))


def _milp(
    seconds: Matrix,
    minimize: str,
    capacity: Sequence[float] | None,
    use: Matrix,
    at_least: int,
    time_limit_s: float,
) -> list[int] | None:
    """By HiGHS: the unknowns are x_ij, row by row, and the makespan T behind them."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix, hstack, identity, kron

    ranks, lanes = seconds.shape
    each_lane, each_rank = kron(np.ones((1, ranks)), identity(lanes)), kron(identity(ranks), np.ones((1, lanes)))
    nothing, one = csr_matrix((lanes, 1)), csr_matrix(np.ones((ranks, 1)))
    limits = [
        LinearConstraint(hstack([each_lane, nothing]), 1, 1),
        LinearConstraint(hstack([each_rank, 0 * one]), at_least, np.inf),
    ]
    if minimize == "makespan":
        limits.append(LinearConstraint(hstack([_by_rank(seconds), -one]), -np.inf, 0))
    if capacity is not None:
        limits.append(LinearConstraint(hstack([_by_rank(use), 0 * one]), -np.inf, np.asarray(capacity, dtype=float)))
    objective = np.append(np.zeros(seconds.size) if minimize == "makespan" else seconds.ravel(), minimize == "makespan")
    found = milp(
        objective,
        constraints=limits,
        integrality=np.append(np.ones(seconds.size), 0),
        bounds=Bounds(0, np.append(np.ones(seconds.size), np.inf)),
        options={"time_limit": time_limit_s},
    )
    if found.x is None:
        return None
    chosen: list[int] = found.x[:-1].reshape(ranks, lanes).argmax(axis=0).tolist()
    return chosen


def _by_rank(values: Matrix) -> "npt.NDArray[np.float64]":
    """Row i holds the values of rank i at the places of its unknowns. Shape (ranks, ranks * lanes)."""
    ranks, lanes = values.shape
    found = np.zeros((ranks, ranks * lanes))
    for rank in range(ranks):
        found[rank, rank * lanes : (rank + 1) * lanes] = values[rank]
    return found


def _longest_first(seconds: Matrix, at_least: int) -> list[int]:
    """The longest lane first, each to the rank that is done with it first (LPT; Graham 1969).

    While there are just enough lanes left for ranks that have too few, only those are asked.
    """
    ranks, lanes = seconds.shape
    if at_least * ranks > lanes:
        raise ValueError(f"wanted at least {at_least} lanes a rank, seen {lanes} lanes and {ranks} ranks")
    load, held, rank_of = np.zeros(ranks), np.zeros(ranks, dtype=int), [0] * lanes
    order = np.argsort(-seconds.min(axis=0), kind="stable").tolist()
    for done, lane in enumerate(order):
        missing = np.maximum(at_least - held, 0)
        asked = np.flatnonzero(missing) if missing.sum() >= lanes - done else np.arange(ranks)
        rank = int(asked[np.argmin(load[asked] + seconds[asked, lane])])
        rank_of[lane], load[rank], held[rank] = rank, load[rank] + seconds[rank, lane], held[rank] + 1
    return rank_of
