"""The assignment is the best there is on small cases, keeps its limits, tells how good it is, and comes in time."""

import doctest
import math
import time
from collections.abc import Sequence
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.assignment import balance_lanes, cut, makespan, partition, solve
from pipelines.assignment.greedy import Matrix, by_regret, longest_first
from tests.conftest import ROOT

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(0, 10**6))
SIZES = st.lists(st.integers(0, 50), min_size=1, max_size=8)


def case(shape: tuple[int, int, int], *, more_seed: int = 0) -> Matrix:
    agents, tasks, seed = shape
    return np.random.default_rng((seed, more_seed)).integers(1, 20, (agents, tasks)).astype(np.float64)


def loads(values: Matrix, agent_of: Sequence[int]) -> list[float]:
    return [
        sum(values[agent, task] for task, its in enumerate(agent_of) if its == agent) for agent in range(len(values))
    ]


def everything(cost: Matrix) -> list[tuple[int, ...]]:
    agents, tasks = cost.shape
    return list(product(range(agents), repeat=tasks))


@settings(max_examples=100, deadline=None)
@given(
    SHAPES,
    st.sampled_from(["makespan", "sum"]),
    st.one_of(st.none(), st.integers(4, 40)),
    st.integers(0, 2),
    st.sampled_from([1.0, 1e-9, 1e9, 3e12]),
    st.sampled_from([0, 1e3, 1e7, 1e12]),
)
def test_against_everything(
    shape: tuple[int, int, int], minimize: str, capacity: int | None, at_least: int, unit: float, forbidden: float
) -> None:
    """In seconds and in nanoseconds, in bytes and in gigabytes; and where a cost says that an agent must not."""
    cost, use = case(shape), case(shape, more_seed=1)
    cost += forbidden * (case(shape, more_seed=2) > 15)
    limits = None if capacity is None else [float(capacity)] * len(cost)
    of = {"makespan": max, "sum": sum}[minimize]
    allowed = [
        agent_of
        for agent_of in everything(cost)
        if (limits is None or max(loads(use, agent_of)) <= limits[0])
        and all(agent_of.count(agent) >= at_least for agent in range(len(cost)))
    ]
    room = None if limits is None else [unit * limit for limit in limits]
    asked = {"minimize": minimize, "capacity": room, "use": unit * use, "at_least": at_least}
    if not allowed:
        with pytest.raises(ValueError, match=r"wanted \d+ tasks assigned .* there is none; raise them|tasks an agent"):
            solve(unit * cost, **asked)
        return
    found = solve(unit * cost, **asked)
    assert found.agent_of in allowed
    assert unit * of(loads(cost, found.agent_of)) == pytest.approx(found.objective)
    best = min(of(loads(cost, agent_of)) for agent_of in allowed)
    assert found.lower_bound <= found.objective
    if forbidden and best >= forbidden:  # no way around what must not be: all ways are about as bad
        assert found.objective == pytest.approx(unit * best, rel=1e-5)
    else:
        assert found.objective == pytest.approx(unit * best)
        assert found.is_optimal if unit >= 1 else found.gap < 1e-5, "sums of costs that are not whole are HiGHS's"
    assert sorted(task for agent in range(len(cost)) for task in found.tasks_of(agent)) == list(range(cost.shape[1]))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 4), st.integers(4, 14), st.integers(0, 10**6))
def test_greedy_rules_never_beat_the_bound(agents: int, tasks: int, seed: int) -> None:
    cost, use = case((agents, tasks, seed)), case((agents, tasks, seed), more_seed=1)
    proven = solve(cost)
    assert proven.objective <= makespan(cost, longest_first(cost)) * (1 + 1e-9)
    capacity = 1.2 * use.sum(axis=1) / agents
    regretted = by_regret(cost, use, capacity, wish=cost)
    if regretted is None:
        return
    assert (np.array(loads(use, regretted)) <= capacity + 1e-9).all()
    bound = solve(cost, minimize="sum", capacity=capacity.tolist(), use=use).lower_bound
    assert sum(loads(cost, regretted)) >= bound - 1e-6


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 4))
def test_longest_first_on_alike_agents(sizes: list[int], agents: int) -> None:
    """Graham's bound, against the least makespan by trying everything."""
    cost = np.repeat(np.array(sizes, dtype=np.float64)[None], agents, axis=0)
    best = partition(sizes, agents)
    assert best.is_optimal
    if len(sizes) <= 6:
        assert best.objective == min(makespan(cost, agent_of) for agent_of in everything(cost))
    assert makespan(cost, longest_first(cost)) <= (4 / 3 - 1 / (3 * agents)) * best.objective + 1e-9


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=9), st.data())
def test_contiguous_stages(costs: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(costs)))
    stages = cut(costs, parts)
    assert (
        len(stages) == parts and all(stages) and [layer for stage in stages for layer in stage] == [*range(len(costs))]
    )

    def longest(ends: Sequence[int]) -> int:
        return max(sum(costs[start:end]) for start, end in zip([0, *ends], [*ends, len(costs)], strict=True))

    wanted = min(longest(ends) for ends in combinations(range(1, len(costs)), parts - 1))
    assert max(sum(costs[layer] for layer in stage) for stage in stages) == wanted


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=6), st.integers(0, 40))
def test_lanes_by_speed(speeds: list[float], more: int) -> None:
    lanes = len(speeds) + more
    shares = balance_lanes(lanes, speeds)
    assert [lane for share in shares for lane in share] == list(range(lanes)) and all(map(len, shares))
    longest = max(len(share) / speed for share, speed in zip(shares, speeds, strict=True))
    sooner = longest * (1 - 1e-6)  # in that time the ranks cannot do all lanes, or one of them none
    assert sum(math.floor(speed * sooner) for speed in speeds) < lanes or min(speeds) * sooner < 1


def test_a_slow_rank_gets_its_share() -> None:
    assert [len(share) for share in balance_lanes(32, [5, 5, 5, 1])] == [10, 10, 10, 2]
    assert [len(share) for share in balance_lanes(8, [1, 1])] == [4, 4]


def test_an_instance_of_or_library() -> None:
    """c515-1 of gap1, a maximization; its optimum is published with it (Beasley 1990, OR-Library)."""
    profit = """17 21 22 18 24 15 20 18 19 18 16 22 24 24 16  23 16 21 16 17 16 19 25 18 21 17 15 25 17 24
                16 20 16 25 24 16 17 19 19 18 20 16 17 21 24  19 19 22 22 20 16 19 17 21 19 25 23 25 25 25
                18 19 15 15 21 25 16 16 23 15 22 17 19 22 24"""
    use = """8 15 14 23 8 16 8 25 9 17 25 15 10 8 24  15 7 23 22 11 11 12 10 17 16 7 16 10 18 22
             21 20 6 22 24 10 24 9 21 14 11 14 11 19 16  20 11 8 14 9 5 6 19 19 7 6 6 13 9 18
             8 13 13 13 10 20 25 16 16 17 10 10 5 12 23"""
    profits, uses = (np.array(text.split(), dtype=np.float64).reshape(5, 15) for text in (profit, use))
    found = solve(-profits, minimize="sum", capacity=[36, 34, 38, 27, 33], use=uses)
    assert (found.objective, found.is_optimal) == (-336, True)


def test_a_large_case_comes_within_its_time_with_an_honest_gap() -> None:
    cost = np.random.default_rng(0).uniform(1, 2, (32, 256))
    started = time.monotonic()
    found = solve(cost, at_least=1, time_limit_s=0.5)
    assert time.monotonic() - started < 20, "a bound against a solver that does not come back, not a measure"
    assert set(found.agent_of) == set(range(32)) and found.objective < 2 * 256 / 32
    assert 0 < found.gap < 0.5 and not found.is_optimal


def test_without_time_the_greedy_rules_stand() -> None:
    cost, use = case((5, 40, 0)), case((5, 40, 0), more_seed=1)
    capacity = (use.sum(axis=1) / 4).tolist()
    found = solve(cost, minimize="sum", capacity=capacity, use=use, time_limit_s=0)
    exact = solve(cost, minimize="sum", capacity=capacity, use=use)
    assert exact.is_optimal and found.lower_bound <= exact.objective <= found.objective


def test_large_partitions_take_the_greedy_rule() -> None:
    sizes = np.random.default_rng(0).integers(1, 10**6, 2000).tolist()
    found = partition(sizes, 8)
    assert found.gap < 1e-3 and sum(sizes[task] for task in found.tasks_of(0)) <= found.objective


def test_bytes_of_large_tensors_are_split_as_well_as_can_be() -> None:
    """HiGHS's tolerances are absolute: in bytes it proved a bound that the optimum is far below."""
    sizes = [841175351, 872799610, 486520433, 779872333, 475944870, 727040838, 258274400]
    found = partition(sizes, 3)
    assert found.objective == 1568216189 and found.is_optimal


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 lane a rank"):
        balance_lanes(2, [1, 1, 1])
    with pytest.raises(ValueError, match="from 1 to 2 stages for 2 layers"):
        cut([1, 2], 3)
    with pytest.raises(ValueError, match="there is none; raise them"):
        solve([[1, 1], [1, 1]], minimize="sum", capacity=[1, 1], use=[[2, 2], [2, 2]])
    with pytest.raises(ValueError, match="costs of at least 0"):
        solve([[1, -1]])
    with pytest.raises(ValueError, match=r"shape \(agents, tasks\)"):
        solve([1, 2])


def test_the_example_of_the_documentation() -> None:
    done = doctest.testfile(str(ROOT / "docs" / "assignment.md"), module_relative=False)
    assert done.attempted and not done.failed
