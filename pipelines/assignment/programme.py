"""Which agent does which task: a 0/1 programme, solved by HiGHS, with greedy rules beside it.

With t_ij the cost of task j at agent i, and x_ij whether it gets it, each task once, either the makespan
max_i sum_j t_ij x_ij is least (R||Cmax), or the sum of t_ij x_ij; under capacities, sum_j u_ij x_ij <= b_i, that is the
generalized assignment problem. Both are NP-hard, so an answer comes with a bound.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipelines.assignment.greedy import by_regret, longest_first

Matrix = npt.NDArray[np.float64]
TIME_LIMIT_S = 10.0
_MODERATE, _MOST_UNITS = 2.0**10, 1e4
_WHOLE_UP_TO = 2.0**53  # beyond that all numbers are whole
_TOLERANCE = 1e-6  # HiGHS's own, by which a number is whole


@dataclass(frozen=True)
class Assignment:
    """An agent for each task, and how good that is.

    Attributes:
        agent_of: The agent of each task.
        objective: The sum, or the makespan, of this assignment.
        lower_bound: What no assignment can be below; proven.
        seconds: Time that finding it took.
    """

    agent_of: tuple[int, ...]
    objective: float
    lower_bound: float
    seconds: float

    @property
    def gap(self) -> float:
        """What the objective may be above the optimum, as a share of it."""
        return (self.objective - self.lower_bound) / max(abs(self.objective), 1e-12)

    @property
    def is_optimal(self) -> bool:
        """Whether it is proven that none is better."""
        return self.gap <= _TOLERANCE

    def tasks_of(self, agent: int) -> list[int]:
        """The tasks of an agent."""
        return [task for task, its in enumerate(self.agent_of) if its == agent]


@dataclass(frozen=True)
class Programme:
    """What is asked.

    Attributes:
        cost: t_ij, of shape (agents, tasks).
        minimize: The makespan, or the sum.
        use: u_ij, what a task takes of an agent's capacity, of shape (agents, tasks).
        capacity: b_i, of shape (agents,); infinite for no limit.
        at_least: Tasks that each agent gets.
    """

    cost: Matrix
    minimize: Literal["makespan", "sum"]
    use: Matrix
    capacity: Matrix
    at_least: int

    def __post_init__(self) -> None:
        agents, tasks = self.cost.shape if self.cost.ndim == 2 else (0, 0)
        if not agents or not tasks:
            raise ValueError(f"wanted costs of shape (agents, tasks), seen shape {self.cost.shape}")
        if self.use.shape != self.cost.shape or self.capacity.shape != (agents,):
            raise ValueError(
                f"wanted use of shape {self.cost.shape} and capacity of shape ({agents},), seen {self.use.shape} and "
                f"{self.capacity.shape}"
            )
        if not np.isfinite(self.cost).all() or not (np.isfinite(self.use) & (self.use >= 0)).all():
            raise ValueError("wanted finite costs, and finite use of at least 0, seen others")
        if self.minimize == "makespan" and self.cost.min() < 0:
            raise ValueError(f"makespan: wanted costs of at least 0, seen {self.cost.min():g}")
        if self.at_least * agents > tasks:
            raise ValueError(f"wanted at least {self.at_least} tasks an agent, seen {tasks} tasks and {agents} agents")

    def objective(self, agent_of: Sequence[int]) -> float:
        """The sum, or the makespan, of an assignment."""
        return (
            makespan(self.cost, agent_of) if self.minimize == "makespan" else float(_loads(self.cost, agent_of).sum())
        )

    def allows(self, agent_of: Sequence[int]) -> bool:
        """Whether the capacities hold it, and each agent has enough tasks."""
        held = np.bincount(agent_of, minlength=len(self.cost))
        room = self.capacity * (1 + _TOLERANCE)
        return bool((_loads(self.use, agent_of) <= room).all() and (held >= self.at_least).all())

    def simple_bound(self) -> float:
        """What the objective cannot be below, whatever the capacities: each task at its cheapest agent."""
        cheapest = self.cost.min(axis=0)
        if self.minimize == "sum":
            return float(cheapest.sum())
        return float(max(cheapest.max(), cheapest.sum() / len(self.cost)))

    def raised(self, bound: float, allowed: npt.NDArray[np.bool_]) -> float:
        """A proven bound, at the next number that sums of whole costs can be: a multiple of what all are multiples of."""
        step = _divisor(self.cost[allowed])
        return float(step * np.ceil(bound / step - _TOLERANCE * max(1.0, abs(bound / step)))) if step else bound

    def within(self, most: float) -> npt.NDArray[np.bool_]:
        """Which agent may do which task where the objective is to be at most that, of shape (agents, tasks)."""
        least = self.cost if self.minimize == "makespan" else self.simple_bound() + self.cost - self.cost.min(axis=0)
        return least <= most + _TOLERANCE * abs(most)

    def scaled(self, unit: float) -> "Programme":
        """The same with costs in that unit, and capacities in units of their own: HiGHS's tolerances are absolute.

        A cost of very many units counts as of so many, by which what is proven stays below what there is.
        """
        room = [
            _unit(use, cap if np.isfinite(cap) else use.max()) for use, cap in zip(self.use, self.capacity, strict=True)
        ]
        most = _MOST_UNITS * max(1.0, float(np.abs(self.cost.min(axis=0)).max()) / unit)
        cost = np.minimum(self.cost / unit, most)
        return replace(self, cost=cost, use=self.use / np.array(room)[:, None], capacity=self.capacity / room)


def _divisor(values: Matrix) -> int:
    """What all are multiples of; 0 where they are not whole, or larger than what tells whole numbers."""
    is_whole = bool((values == np.rint(values)).all()) and float(np.abs(values).max(initial=0.0)) <= _WHOLE_UP_TO
    return (int(np.gcd.reduce(values.astype(np.int64), axis=None)) or 1) if is_whole else 0


def _unit(values: Matrix, typical: float) -> float:
    """By which `typical` is of a moderate size: whole numbers stay whole where they can, others lose no digit by it."""
    unit = float(_divisor(values))
    if unit and typical / unit <= _MODERATE:
        return unit
    return 2.0 ** math.floor(math.log2(typical / _MODERATE)) if typical > 0 else 1.0


def makespan(cost: Matrix, agent_of: Sequence[int]) -> float:
    """The time of the agent that takes longest."""
    return float(_loads(cost, agent_of).max())


def solve(
    cost: npt.ArrayLike,
    *,
    minimize: Literal["makespan", "sum"] = "makespan",
    capacity: Sequence[float] | None = None,
    use: npt.ArrayLike | None = None,
    at_least: int = 0,
    time_limit_s: float = TIME_LIMIT_S,
) -> Assignment:
    """The best assignment that is found in time, and a bound on what is possible.

    What is found within a time depends on the machine: where several processes must agree, one solves and tells.

    Args:
        cost: t_ij, of shape (agents, tasks).
        minimize: The makespan, or the sum.
        capacity: What each agent holds at most; None: no limit.
        use: What a task takes of it, of shape (agents, tasks); 1 by default.
        at_least: Tasks that each agent gets.
        time_limit_s: For HiGHS; at 0 the greedy rules stand alone.

    Raises:
        ValueError: The capacities cannot hold the tasks, or no way to hold them was found in time; the numbers are not
            of the shapes above.
    """
    started, costs = time.monotonic(), np.asarray(cost, dtype=np.float64)
    programme = Programme(
        cost=costs,
        minimize=minimize,
        use=np.ones_like(costs) if use is None else np.asarray(use, dtype=np.float64),
        capacity=np.full(len(costs), np.inf) if capacity is None else np.asarray(capacity, dtype=np.float64),
        at_least=at_least,
    )
    bound = programme.simple_bound()
    found = [agent_of for agent_of in _greedy(programme) if programme.allows(agent_of)]
    unit = _unit(costs, float(np.abs(costs.min(axis=0)).max()) or float(np.abs(costs).max()))
    before = np.zeros(costs.shape, dtype=np.bool_)
    while (left_s := started + time_limit_s - time.monotonic()) > 0:
        least = min(map(programme.objective, found), default=np.inf)
        allowed = programme.within(least)
        if least <= bound or np.array_equal(allowed, before):
            break
        exact, proven = _by_highs(programme.scaled(unit), allowed, left_s)
        if np.isfinite(proven):
            bound = max(bound, programme.raised(proven * unit, allowed))
        elif not found:
            bound = max(bound, proven)
        found += [exact] if exact and programme.allows(exact) else []
        before = allowed
    if not found:
        why = "there is none" if np.isinf(bound) else f"none was found in {time_limit_s:g} s"
        raise ValueError(
            f"wanted {costs.shape[1]} tasks assigned to {len(costs)} agents within the capacities "
            f"{programme.capacity.tolist()}, {why}; raise them"
        )
    best = min(found, key=programme.objective)
    objective = programme.objective(best)
    return Assignment(tuple(best), objective, min(bound, objective), time.monotonic() - started)


def _greedy(programme: Programme) -> list[list[int]]:
    """What the greedy rules find; some may break a limit."""
    found = [longest_first(programme.cost, at_least=programme.at_least)] if programme.minimize == "makespan" else []
    if found and np.isinf(programme.capacity).all() and (programme.cost == programme.cost[0]).all():
        return found  # agents are alike: nothing is to be regretted
    share = programme.use / np.maximum(programme.capacity, 1e-12)[:, None]
    regretted = [by_regret(programme.cost, programme.use, programme.capacity, wish=w) for w in (programme.cost, share)]
    return found + [agent_of for agent_of in regretted if agent_of is not None]


def _by_highs(
    programme: Programme, allowed: npt.NDArray[np.bool_], time_limit_s: float
) -> tuple[list[int] | None, float]:
    """The best that HiGHS finds and the bound that it proves; infinite where it proves that there is no assignment.

    The unknowns are x_ij, row by row, and the makespan behind them (Huangfu & Hall 2018, Parallelizing the dual revised
    simplex method; scipy.optimize.milp).
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import block_diag, csr_matrix, hstack, identity, kron

    cost, is_makespan = np.where(allowed, programme.cost, 0.0), programme.minimize == "makespan"
    agents, tasks = cost.shape
    nothing, one = csr_matrix((agents, 1)), csr_matrix(np.ones((agents, 1)))

    def by_agent(values: Matrix, last: csr_matrix) -> csr_matrix:
        return hstack([block_diag([row[None] for row in values]), last])

    once = hstack([kron(np.ones((1, agents)), identity(tasks)), csr_matrix((tasks, 1))])
    limits = [LinearConstraint(once, 1, 1)]
    if is_makespan:
        limits.append(LinearConstraint(by_agent(cost, -one), -np.inf, 0))
    if programme.at_least:
        limits.append(LinearConstraint(by_agent(np.ones_like(cost), nothing), programme.at_least, np.inf))
    if np.isfinite(programme.capacity).any():
        limits.append(LinearConstraint(by_agent(programme.use, nothing), -np.inf, programme.capacity))
    found = milp(
        np.append(np.zeros(cost.size) if is_makespan else cost.ravel(), is_makespan),
        constraints=limits,
        integrality=np.append(np.ones(cost.size), 0),
        bounds=Bounds(0, np.append(allowed.ravel().astype(np.float64), np.inf if is_makespan else 0)),
        options={"time_limit": time_limit_s, "mip_rel_gap": 0},
    )
    if found.status == 2:
        return None, np.inf
    bound = -np.inf if found.mip_dual_bound is None else float(found.mip_dual_bound)
    if found.x is None:
        return None, bound
    chosen: list[int] = found.x[:-1].reshape(agents, tasks).argmax(axis=0).tolist()
    return chosen, bound


def _loads(values: Matrix, agent_of: Sequence[int]) -> Matrix:
    """What each agent has in sum, of shape (agents,)."""
    taken = values[list(agent_of), np.arange(values.shape[1])]
    return np.bincount(agent_of, weights=taken, minlength=len(values)).astype(np.float64)
