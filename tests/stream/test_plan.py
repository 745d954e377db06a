"""The plan is a pure function that reads every row once, in one order at any number of ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.stream.plan import EpochPlan, assign_lanes, most_rows, needed_steps, pieces


@st.composite
def plans(draw: st.DrawFn) -> EpochPlan:
    lanes = draw(st.integers(1, 9))
    return EpochPlan(
        shard_rows=tuple(draw(st.lists(st.integers(0, 40), min_size=1, max_size=12))),
        lanes=lanes,
        batch_size=lanes * draw(st.integers(1, 7)),
        window=draw(st.integers(1, 5)),
        seed=draw(st.integers(-3, 2**63)),
        epoch=draw(st.integers(0, 5)),
    )


def sequence(plan: EpochPlan) -> list[tuple[int, int]]:
    """The whole order as (shard, row)."""
    found = []
    for window in range(plan.num_windows):
        rows = [(shard, row) for shard in plan.window_shards(window) for row in range(plan.shard_rows[shard])]
        found += [rows[i] for i in plan.window_rows(window)]
    return found


def global_batch(plan: EpochPlan, step: int, ranks: int) -> list[int]:
    """Positions of the sequence in a global batch, rank by rank."""
    return [
        position
        for lanes in assign_lanes(plan.lanes, ranks)
        for start, end in plan.batch_bounds(lanes, step, step + 1).T
        for position in range(start, end)
    ]


@settings(max_examples=400, deadline=None)
@given(plans())
def test_every_row_exactly_once(plan: EpochPlan) -> None:
    rows = sequence(plan)
    assert len(rows) == plan.rows == len(set(rows))
    taken = [position for step in range(plan.steps) for position in global_batch(plan, step, 1)]
    assert sorted(taken) == list(range(plan.rows))


@settings(max_examples=300, deadline=None)
@given(plans())
def test_the_same_global_batches_at_every_world_size(plan: EpochPlan) -> None:
    for step in range(plan.steps):
        wanted = global_batch(plan, step, 1)
        assert plan.batch_rows(step) == len(wanted)
        for ranks in range(1, plan.lanes + 1):
            assert global_batch(plan, step, ranks) == wanted


@settings(max_examples=300, deadline=None)
@given(plans())
def test_lanes_steps_and_full_batches(plan: EpochPlan) -> None:
    sizes = [end - start for start, end in map(plan.lane_range, range(plan.lanes))]
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == plan.rows
    bounds = plan.batch_bounds(range(plan.lanes), 0, plan.steps)
    assert list(map(tuple, bounds[[0, -1]].T)) == [plan.lane_range(lane) for lane in range(plan.lanes)]
    longest = -(-plan.rows // plan.lanes)
    assert plan.steps == -(-longest // plan.lane_batch)
    for step in range(plan.steps - 1):
        assert plan.batch_rows(step) == plan.batch_size, "all but the last are full"


@settings(max_examples=200, deadline=None)
@given(plans(), st.data())
def test_pieces_cover_a_range_window_by_window(plan: EpochPlan, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, plan.rows))
    end = data.draw(st.integers(start, plan.rows))
    positions = [plan.window_starts[p.window] + i for p in pieces(plan, start, end) for i in range(p.start, p.end)]
    assert positions == list(range(start, end))


def plan_of(**changes: int) -> EpochPlan:
    values = {"lanes": 4, "batch_size": 16, "window": 2, "seed": 0, "epoch": 0} | changes
    return EpochPlan(shard_rows=(100,) * 6, **values)  # type: ignore[arg-type]


def test_the_order_is_new_each_epoch_and_seed_zero_is_a_seed() -> None:
    first = sequence(plan_of())
    assert first == sequence(plan_of())
    assert first != sequence(plan_of(epoch=1)) and first != sequence(plan_of(seed=1))
    assert first != sorted(first)


def test_unshuffled_keeps_the_files_order() -> None:
    plan = EpochPlan(shard_rows=(3, 2), lanes=2, batch_size=2, shuffle=False)
    assert sequence(plan) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_rows_of_a_window_are_shuffled_well() -> None:
    rows = plan_of().window_rows(0)
    assert abs(np.corrcoef(rows, np.arange(len(rows)))[0, 1]) < 0.2
    assert np.mean(np.diff(rows) == 1) < 0.05


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="divisible by 3 lanes"):
        EpochPlan(shard_rows=(5,), lanes=3, batch_size=4)
    with pytest.raises(ValueError, match="at least as many lanes as ranks"):
        assign_lanes(2, 3)


def test_an_empty_table_has_no_steps() -> None:
    assert EpochPlan(shard_rows=(), lanes=2, batch_size=4).steps == 0


@settings(max_examples=200, deadline=None)
@given(plans(), st.data())
def test_the_windows_that_a_step_needs(plan: EpochPlan, data: st.DataObject) -> None:
    lanes = data.draw(st.sampled_from(assign_lanes(plan.lanes, data.draw(st.integers(1, plan.lanes)))))
    start = data.draw(st.integers(0, plan.steps))
    wanted: list[set[int]] = []
    for step in range(start, plan.steps):
        bounds = plan.batch_bounds(lanes, step, step + 1).T.tolist()
        wanted.append({piece.window for first, last in bounds for piece in pieces(plan, first, last)})
    needed = needed_steps(plan, lanes, start)
    for step, windows in enumerate(wanted, start):
        assert windows <= {window for window, (first, last) in needed.items() if first <= step <= last}
    assert needed.keys() == set().union(*wanted)
    held = [sum(plan.window_len(w) for w, (a, b) in needed.items() if a <= s <= b) for s in range(plan.steps)]
    assert most_rows(plan, needed) == max(held, default=0)
