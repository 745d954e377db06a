"""The assignment is the best there is on small cases, keeps its limits, and comes in time on large ones."""

import math
import time
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.stream.assignment import Matrix, balance_lanes, makespan, solve

CASES = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(0, 10**6))


def case(shape: tuple[int, int, int]) -> Matrix:
    ranks, lanes, seed = shape
    return np.random.default_rng(seed).integers(1, 20, (ranks, lanes)).astype(np.float64)


def everything(seconds: Matrix) -> list[tuple[int, ...]]:
    ranks, lanes = seconds.shape
    return list(product(range(ranks), repeat=lanes))


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_the_makespan_is_least(shape: tuple[int, int, int]) -> None:
    seconds = case(shape)
    best = min(makespan(seconds, rank_of) for rank_of in everything(seconds))
    assert makespan(seconds, solve(seconds)) == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(CASES, st.integers(4, 40))
def test_the_sum_is_least_under_capacities(shape: tuple[int, int, int], capacity: int) -> None:
    seconds = case(shape)
    use = case((shape[0], shape[1], shape[2] + 1))
    limits = [float(capacity)] * len(seconds)
    lanes = range(seconds.shape[1])

    def held(rank_of: tuple[int, ...] | list[int]) -> bool:
        load = np.zeros(len(seconds))
        for lane in lanes:
            load[rank_of[lane]] += use[rank_of[lane], lane]
        return bool((load <= limits).all())

    costs = [sum(seconds[rank_of[lane], lane] for lane in lanes) for rank_of in everything(seconds) if held(rank_of)]
    if not costs:
        with pytest.raises(ValueError, match="within the capacities"):
            solve(seconds, minimize="sum", capacity=limits, use=use)
        return
    found = solve(seconds, minimize="sum", capacity=limits, use=use)
    assert held(found) and sum(seconds[found[lane], lane] for lane in lanes) == pytest.approx(min(costs))


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


def test_a_large_case_comes_within_its_time() -> None:
    seconds = np.random.default_rng(0).uniform(1, 2, (32, 256))
    started = time.monotonic()
    rank_of = solve(seconds, at_least=1, time_limit_s=0.5)
    assert time.monotonic() - started < 20, "a bound against a solver that does not come back, not a measure"
    assert set(rank_of) == set(range(32))
    assert makespan(seconds, rank_of) < 2 * 256 / 32


def test_more_ranks_than_lanes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 lanes a rank"):
        balance_lanes(2, [1, 1, 1])
