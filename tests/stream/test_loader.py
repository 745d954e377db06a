"""The loader gives each rank its rows: all of them once, in the plan's order, from any step on."""

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import DataError
from pipelines.lake import Snapshot
from pipelines.stream import loader as loader_module
from pipelines.stream.loader import Batch, LaneLoader, shards_of
from pipelines.stream.plan import EpochPlan, assign_lanes
from pipelines.stream.reader import read_shards
from tests.tables import DENSE, IMAGE, LABEL, ROW_ID, contract_of, feature_table

COLUMNS = [ROW_ID, DENSE, LABEL]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return feature_table(tmp_path_factory.mktemp("t") / "t", [40, 7, 1, 33, 20, 15], contract_of(DENSE))


def plan_of(snapshot: Snapshot, *, lanes: int, batch: int, window: int = 2, epoch: int = 0) -> EpochPlan:
    rows = tuple(shard.rows for shard in shards_of(snapshot))
    return EpochPlan(shard_rows=rows, lanes=lanes, batch_size=batch, window=window, epoch=epoch)


def batches(snapshot: Snapshot, plan: EpochPlan, ranks: int, start_step: int = 0) -> list[list[Batch]]:
    """For each step the batches of all ranks."""
    by_rank = []
    for lanes in assign_lanes(plan.lanes, ranks):
        loader = LaneLoader(snapshot, plan, COLUMNS, lanes, start_step=start_step)
        by_rank.append(list(loader))
        loader.close()
    assert len({len(rank) for rank in by_rank}) == 1, "equal steps on all ranks"
    return [list(step) for step in zip(*by_rank, strict=True)]


def ids(step: list[Batch]) -> list[int]:
    return [i for batch in step for i in batch.tensors["row_id"][: batch.rows].tolist()]


@settings(max_examples=25, deadline=None)
@given(lanes=st.integers(1, 8), b=st.integers(1, 9), window=st.integers(1, 4), epoch=st.integers(0, 3))
def test_every_row_once_and_the_same_batches_at_any_number_of_ranks(
    snapshot: Snapshot, lanes: int, b: int, window: int, epoch: int
) -> None:
    plan = plan_of(snapshot, lanes=lanes, batch=lanes * b, window=window, epoch=epoch)
    alone = [ids(step) for step in batches(snapshot, plan, 1)]
    everything = read_shards(shards_of(snapshot), [ROW_ID])["row_id"].tolist()
    assert sorted(i for step in alone for i in step) == sorted(everything)
    for ranks in {2, lanes} if lanes > 1 else set():
        assert [ids(step) for step in batches(snapshot, plan, ranks)] == alone


@pytest.mark.parametrize("start", [0, 1, 3, 6])
def test_starts_anywhere(snapshot: Snapshot, start: int) -> None:
    plan = plan_of(snapshot, lanes=4, batch=16)
    assert plan.steps == 8
    whole = [ids(step) for step in batches(snapshot, plan, 2)]
    assert [ids(step) for step in batches(snapshot, plan, 2, start_step=start)] == whole[start:]


def test_columns_of_a_row_stay_together(snapshot: Snapshot) -> None:
    arrays = read_shards(shards_of(snapshot), COLUMNS)
    dense_of = dict(zip(arrays["row_id"].tolist(), arrays["dense"].tolist(), strict=True))
    for step in batches(snapshot, plan_of(snapshot, lanes=4, batch=8), 2):
        for batch in step:
            for i, values in zip(
                batch.tensors["row_id"][: batch.rows].tolist(), batch.tensors["dense"].tolist(), strict=False
            ):
                assert dense_of[i] == values


def test_a_rank_without_rows_gets_one_row_of_zeros(tmp_path: Path) -> None:
    snapshot = feature_table(tmp_path / "t", [2], contract_of(DENSE))
    steps = batches(snapshot, plan_of(snapshot, lanes=4, batch=4), 4)
    assert len(steps) == 1 and [batch.rows for batch in steps[0]].count(0) == 2
    for batch in steps[0]:
        assert batch.global_rows == 2 and batch.tensors["dense"].shape == (1, 4)
        if not batch.rows:
            assert torch.count_nonzero(batch.tensors["dense"]) == 0


def test_fewer_rows_than_lanes_and_fewer_shards_than_lanes(tmp_path: Path) -> None:
    snapshot = feature_table(tmp_path / "t", [3], contract_of(DENSE))
    steps = batches(snapshot, plan_of(snapshot, lanes=8, batch=16), 3)
    assert len(steps) == 1 and len(ids(steps[0])) == 3


def test_images_keep_their_shape_and_bytes(tmp_path: Path) -> None:
    snapshot = feature_table(tmp_path / "t", [9], contract_of(IMAGE))
    loader = LaneLoader(snapshot, plan_of(snapshot, lanes=1, batch=9), [IMAGE], [0])
    (batch,) = list(loader)
    assert batch.tensors["image"].shape == (9, 4, 4) and batch.tensors["image"].dtype == torch.uint8


def test_a_window_is_read_once_a_rank(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def counting(shards: object, columns: object) -> object:
        read.append(len(shards))  # type: ignore[arg-type]
        return read_shards(shards, columns)  # type: ignore[arg-type]

    monkeypatch.setattr(loader_module, "read_shards", counting)
    plan = plan_of(snapshot, lanes=6, batch=12, window=3)
    loader = LaneLoader(snapshot, plan, COLUMNS, range(6))
    list(loader)
    assert sum(read) == len(shards_of(snapshot))


def test_an_error_in_a_thread_reaches_the_caller(tmp_path: Path) -> None:
    snapshot = feature_table(tmp_path / "t", [20, 20, 20], contract_of(DENSE))
    gone = shards_of(snapshot)[2].path
    gone.unlink()
    loader = LaneLoader(snapshot, plan_of(snapshot, lanes=2, batch=4, window=1), COLUMNS, range(2))
    with pytest.raises(DataError, match=gone.name):
        list(loader)
    loader.close()


def test_closing_midway_ends_the_threads(snapshot: Snapshot) -> None:
    before = threading.active_count()
    for _ in range(5):
        loader = LaneLoader(snapshot, plan_of(snapshot, lanes=4, batch=4), COLUMNS, range(4))
        next(iter(loader))
        loader.close()
        loader.close()
    for thread in threading.enumerate():
        if thread.name.startswith("read"):
            thread.join(timeout=5)
    assert threading.active_count() <= before


def test_a_plan_over_other_shards_is_refused(snapshot: Snapshot) -> None:
    with pytest.raises(ValueError, match="plan over the Snapshot's shards"):
        LaneLoader(snapshot, EpochPlan(shard_rows=(1,), lanes=1, batch_size=1), COLUMNS, [0])
