"""The assignment's exact solver on random instances: does it prove the optimum, and how fast.

    python -m benchmarks.assignment

Sizes and ranges are those of OR-Library's gap1 to gap12, five instances each: use in [5, 25], profit in [15, 25], whole
numbers, capacity 0.8 of the agents' mean use of all tasks, rounded down; the profit is greatest. For the makespan
of different agents (R||Cmax) and of alike ones (P||Cmax, which is harder to prove) costs are whole numbers in [1, 100];
these have no goal.
"""

import os
import sys
from pathlib import Path

import numpy as np

from benchmarks.report import Figure, at_most, report
from pipelines.assignment import Assignment, makespan, solve
from pipelines.assignment.greedy import longest_first

GAP_SIZES = [
    (5, 15),
    (5, 20),
    (5, 25),
    (5, 30),
    (8, 24),
    (8, 32),
    (8, 40),
    (8, 48),
    (10, 30),
    (10, 40),
    (10, 50),
    (10, 60),
]
MAKESPAN_SIZES = [(4, 16), (4, 32), (8, 32), (8, 64), (16, 64), (16, 128), (32, 256)]
ALIKE_SIZES = [(4, 16), (4, 32), (8, 32), (8, 64)]
INSTANCES = 5
LIMIT_S = 10.0


def generalized(agents: int, tasks: int, instance: int) -> Assignment:
    """Solve an instance of gap1 to gap12's generator."""
    generator = np.random.default_rng((agents, tasks, instance))
    use = generator.integers(5, 26, (agents, tasks))
    profit = generator.integers(15, 26, (agents, tasks))
    capacity = np.floor(0.8 * use.sum(axis=1) / agents).tolist()
    return solve(-profit, minimize="sum", capacity=capacity, use=use, time_limit_s=LIMIT_S)


def least_makespan(agents: int, tasks: int, instance: int, *, alike: bool) -> tuple[Assignment, float]:
    """Solve an instance of the makespan; with it the greedy rule's, over the one that was found."""
    kinds = 1 if alike else agents
    cost = np.random.default_rng((agents, tasks, instance)).integers(1, 101, (kinds, tasks)).astype(np.float64)
    cost = np.repeat(cost, agents // kinds, axis=0)
    found = solve(cost, time_limit_s=LIMIT_S)
    return found, makespan(cost, longest_first(cost)) / found.objective


def main() -> int:
    """Returns the exit code."""
    figures = []
    for number, (agents, tasks) in enumerate(GAP_SIZES, start=1):
        name = f"assignment.gap{number}_{agents}x{tasks}"
        found = [generalized(agents, tasks, instance) for instance in range(INSTANCES)]
        figures += [
            at_most(f"{name}.slowest", max(one.seconds for one in found), "s", LIMIT_S),
            at_most(f"{name}.worst_gap", max(one.gap for one in found), "share", 0.0),
        ]
    for kind, sizes in (("different", MAKESPAN_SIZES), ("alike", ALIKE_SIZES)):
        for agents, tasks in sizes:
            name = f"assignment.makespan_{kind}_{agents}x{tasks}"
            solved = [least_makespan(agents, tasks, i, alike=kind == "alike") for i in range(INSTANCES)]
            figures += [
                Figure(f"{name}.slowest", max(one.seconds for one, _ in solved), "s"),
                Figure(f"{name}.worst_gap", max(one.gap for one, _ in solved), "share"),
                Figure(f"{name}.proven", sum(one.is_optimal for one, _ in solved), f"of {INSTANCES}"),
                Figure(f"{name}.greedy", max(ratio for _, ratio in solved), "x"),
            ]
    return report("assignment", figures)


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[1])
    sys.exit(main())
