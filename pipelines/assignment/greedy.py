"""Greedy rules: good assignments at once, without a bound of their own."""

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def longest_first(cost: Matrix, *, at_least: int = 0) -> list[int]:
    """The longest task first, each to the agent that is done with it first (LPT; Graham 1969).

    On m alike agents its makespan is at most 4/3 - 1/(3m) of the least. While there are just enough tasks left for agents
    that have too few, only those are asked.

    Args:
        cost: Of shape (agents, tasks).
        at_least: Tasks that each agent gets.
    """
    agents, tasks = cost.shape
    load, held, agent_of = np.zeros(agents), np.zeros(agents, dtype=int), [0] * tasks
    order = np.argsort(-cost.min(axis=0), kind="stable").tolist()
    for done, task in enumerate(order):
        missing = np.maximum(at_least - held, 0)
        asked = np.flatnonzero(missing) if missing.sum() >= tasks - done else np.arange(agents)
        agent = int(asked[np.argmin(load[asked] + cost[asked, task])])
        agent_of[task], load[agent], held[agent] = agent, load[agent] + cost[agent, task], held[agent] + 1
    return agent_of


def by_regret(cost: Matrix, use: Matrix, capacity: Matrix, *, wish: Matrix) -> list[int] | None:
    """The task that would lose most by its second choice goes next, to its first (MTHG; Martello & Toth 1990, chapter 7).

    Then each task moves once to the cheapest agent that has room.

    Args:
        cost: Of shape (agents, tasks).
        use: What a task takes of the capacity, of shape (agents, tasks).
        capacity: Of shape (agents,).
        wish: By which choices are ranked, lowest first, of shape (agents, tasks).

    Returns:
        The agent of each task; None where a task is left that fits nowhere.
    """
    room, agent_of, left = capacity.copy(), [0] * cost.shape[1], list(range(cost.shape[1]))
    while left:
        wishes = np.where(use[:, left] <= room[:, None], wish[:, left], np.inf)
        first, second = np.sort(np.vstack([wishes, np.full(len(left), np.inf)]), axis=0)[:2]
        if np.isinf(first).any():
            return None
        place = int(np.argmax(second - first))
        task, agent = left.pop(place), int(np.argmin(wishes[:, place]))
        agent_of[task], room[agent] = agent, room[agent] - use[agent, task]
    for task, now in enumerate(agent_of):
        room[now] += use[now, task]
        fits = use[:, task] <= room
        fits[now] = True  # whatever rounding says
        agent = int(np.argmin(np.where(fits, cost[:, task], np.inf)))
        agent_of[task], room[agent] = agent, room[agent] - use[agent, task]
    return agent_of
