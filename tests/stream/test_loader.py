"""The loader gives each rank its rows: all of them once, in the plan's order, from any step on."""

import threading
import time
import weakref
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from deltalake import WriterProperties, write_deltalake
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import DataError, TrainingError
from pipelines.lake import Snapshot
from pipelines.stream import Batch, EpochReceipt, LaneLoader, windows
from pipelines.stream.reader import empty_arrays, read_shards
from pipelines.stream.shards import shards_of
from tests.tables import DENSE, IMAGE, LABEL, ROW_ID, contract_of, feature_table

COLUMNS = [ROW_ID, DENSE, LABEL]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return feature_table(tmp_path_factory.mktemp("t") / "t", [40, 7, 1, 33, 20, 15], contract_of(DENSE))


def batches(snapshot: Snapshot, ranks: int, *, state: dict[str, Any] | None = None, **order: Any) -> list[list[Batch]]:
    """For each step of an epoch the batches of all ranks."""
    by_rank = []
    for rank in range(ranks):
        with LaneLoader(snapshot, rank=rank, world_size=ranks, epochs=1, **order) as loader:
            if state:
                loader.load_state_dict(state)
            by_rank.append(list(loader))
    assert len({len(rank) for rank in by_rank}) == 1, "equal steps on all ranks"
    return [list(step) for step in zip(*by_rank, strict=True)]


def ids(step: list[Batch]) -> list[int]:
    return [i for batch in step for i in batch.tensors["row_id"][: batch.rows].tolist()]


@settings(max_examples=25, deadline=None)
@given(lanes=st.integers(1, 8), b=st.integers(1, 9), window=st.integers(1, 4), seed=st.integers(-1, 3))
def test_every_row_once_and_the_same_batches_at_any_number_of_ranks(
    snapshot: Snapshot, lanes: int, b: int, window: int, seed: int
) -> None:
    order = {"lanes": lanes, "batch_size": lanes * b, "window": window, "seed": seed}
    alone = [ids(step) for step in batches(snapshot, 1, **order)]
    everything = read_shards(shards_of(snapshot), [ROW_ID])["row_id"].tolist()
    assert sorted(i for step in alone for i in step) == sorted(everything)
    for ranks in {2, lanes} if lanes > 1 else set():
        assert [ids(step) for step in batches(snapshot, ranks, **order)] == alone


def test_an_epoch_an_iteration_each_in_another_order_with_a_receipt(snapshot: Snapshot) -> None:
    orders = []
    with LaneLoader(snapshot, 16, rank=0, world_size=1) as loader:
        assert len(loader) == 8 and loader.lanes == 16
        for epoch in range(3):
            assert loader.epoch == epoch
            receipt = EpochReceipt(snapshot)
            taken = []
            for batch in loader:
                receipt.add(batch)
                taken += ids([batch])
            receipt.check(epoch=epoch)
            orders.append(taken)
    assert len({tuple(order) for order in orders}) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_a_receipt_with_a_row_dropped_repeated_or_exchanged_fails(snapshot: Snapshot) -> None:
    taken = [batch for (batch,) in batches(snapshot, 1, batch_size=16)]
    for wrong in (taken[1:], [*taken, taken[0]], [taken[1], *taken[1:]]):
        receipt = EpochReceipt(snapshot)
        for batch in wrong:
            receipt.add(batch)
        with pytest.raises(TrainingError, match=r"epoch 4: the receipt does not agree.*wanted 116 rows"):
            receipt.check(epoch=4)


@pytest.mark.parametrize("steps", [0, 1, 3, 7, 8])
def test_goes_on_from_a_state_at_any_step_and_any_number_of_ranks(snapshot: Snapshot, steps: int) -> None:
    order = {"batch_size": 16, "lanes": 4, "seed": 5}
    whole = [ids(step) for step in batches(snapshot, 2, **order)]
    assert len(whole) == 8
    with LaneLoader(snapshot, rank=1, world_size=2, **order) as loader:  # type: ignore[arg-type]
        taken = iter(loader)
        receipt = EpochReceipt(snapshot)
        for _ in range(steps):
            receipt.add(next(taken))
        state = loader.state_dict()
    assert (state["epoch"], state["step"]) == ((0, steps) if steps < 8 else (1, 0))
    for ranks in (1, 2, 4):
        rest = [ids(step) for step in batches(snapshot, ranks, state=state, **order)]
        assert steps == 8 or rest == whole[steps:]
    again = EpochReceipt(snapshot)
    again.load_state_dict(receipt.state_dict())
    assert again.reduced() == receipt.reduced()


@pytest.mark.parametrize("at_step", [2, 5, 7, 8, 99])
def test_lanes_move_at_a_step_and_the_rows_stay(snapshot: Snapshot, at_step: int) -> None:
    order: dict[str, Any] = {"batch_size": 16, "lanes": 8, "seed": 5}
    with LaneLoader(snapshot, **order) as loader:
        whole = [[ids([batch]) for batch in loader] for _ in range(2)]
    moved = [range(0, 1), range(1, 7), range(7, 8)]
    taken: list[list[list[list[int]]]] = []
    for rank in range(3):
        with LaneLoader(snapshot, rank=rank, world_size=3, **order) as loader:
            epochs: list[list[list[int]]] = []
            for _ in range(2):
                epochs.append([])
                for batch in loader:
                    epochs[-1].append(ids([batch]))
                    if loader.epoch == 0 and batch.step == 1:
                        loader.reassign(moved, at_step=at_step)
            taken.append(epochs)
    for epoch in range(2):
        together = [list(chain(*parts)) for parts in zip(*(rank[epoch] for rank in taken), strict=True)]
        assert together == whole[epoch]
    assert len(taken[1][1][0]) == 6 * 2, "the second rank has six lanes in the next epoch as well"


def test_a_state_of_another_run_is_refused_by_name(snapshot: Snapshot, tmp_path: Path) -> None:
    state = LaneLoader(snapshot, 16, lanes=4, seed=5).state_dict()
    for change in ({"seed": 6}, {"lanes": 8}, {"window": 2}, {"batch_size": 32}, {"shuffle": False}):
        (name,) = change
        with pytest.raises(
            DataError, match=rf"loader state: {name}: wanted {change[name]}, the state has {state[name]}"
        ):
            LaneLoader(snapshot, **{"batch_size": 16, "lanes": 4, "seed": 5} | change).load_state_dict(state)
    other = feature_table(tmp_path / "t", [3], contract_of(DENSE))
    with pytest.raises(DataError, match="loader state: snapshot: wanted"):
        LaneLoader(other, 16, lanes=4, seed=5).load_state_dict(state)


def test_leaving_an_epoch_early_goes_on_with_the_next_step(snapshot: Snapshot) -> None:
    whole = [ids(step) for step in batches(snapshot, 1, batch_size=16)]
    with LaneLoader(snapshot, 16) as loader:
        first = [ids([batch]) for batch, _ in zip(loader, range(3), strict=False)]
        assert loader.step == len(first) + 1, "zip took one more"
        rest = [ids([batch]) for batch in loader]
    assert first == whole[:3] and rest == whole[4:]


def test_columns_of_a_row_stay_together(snapshot: Snapshot) -> None:
    arrays = read_shards(shards_of(snapshot), COLUMNS)
    dense_of = dict(zip(arrays["row_id"].tolist(), arrays["dense"].tolist(), strict=True))
    for step in batches(snapshot, 2, lanes=4, batch_size=8, window=2):
        for batch in step:
            for i, values in zip(
                batch.tensors["row_id"][: batch.rows].tolist(), batch.tensors["dense"].tolist(), strict=False
            ):
                assert dense_of[i] == values


def test_chosen_columns(snapshot: Snapshot) -> None:
    with LaneLoader(snapshot, 16, columns=["label"]) as loader:
        assert list(next(iter(loader)).tensors) == ["row_id", "label"]
    with pytest.raises(DataError, match="wanted a column 'labl', seen row_id, dense, label"):
        LaneLoader(snapshot, 16, columns=["labl"])


def test_a_transform_is_applied_before_a_batch_is_handed_out(snapshot: Snapshot) -> None:
    threads = set()

    def twice(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        threads.add(threading.current_thread().name)
        both = torch.cat([tensors["dense"], tensors["dense"]], dim=1)
        return {"both": both, "label": tensors["label"], "row_id": torch.zeros_like(tensors["label"])}

    with LaneLoader(snapshot, 12, rank=0, world_size=1, epochs=1, transform=twice) as loader:
        made = list(loader)
    with LaneLoader(snapshot, 12, rank=0, world_size=1, epochs=1) as loader:
        plain = list(loader)
    assert threads - {threading.current_thread().name}, "the rows are prepared by another thread"
    assert [list(batch.tensors) for batch in made[:1]] == [["row_id", "both", "label"]]
    for ours, theirs in zip(made, plain, strict=True):
        assert torch.equal(ours.tensors["row_id"], theirs.tensors["row_id"])
        assert torch.equal(ours.tensors["both"], theirs.tensors["dense"].repeat(1, 2))


def test_a_transform_that_loses_rows_is_refused(snapshot: Snapshot) -> None:
    loader = LaneLoader(snapshot, 12, rank=0, world_size=1, transform=lambda tensors: {"label": tensors["label"][1:]})
    with pytest.raises(DataError, match=r"transform: 'label': wanted 1 rows, as given, seen 0"):
        next(iter(loader))


def test_a_rank_without_rows_gets_one_row_of_zeros(tmp_path: Path) -> None:
    snapshot = feature_table(tmp_path / "t", [2], contract_of(DENSE))
    steps = batches(snapshot, 4, lanes=4, batch_size=4)
    assert len(steps) == 1 and [batch.rows for batch in steps[0]].count(0) == 2
    for batch in steps[0]:
        assert batch.global_rows == 2 and batch.tensors["dense"].shape == (1, 4)
        if not batch.rows:
            assert torch.count_nonzero(batch.tensors["dense"]) == 0


def test_fewer_rows_than_lanes_and_fewer_shards_than_lanes(tmp_path: Path) -> None:
    snapshot = feature_table(tmp_path / "t", [3], contract_of(DENSE))
    steps = batches(snapshot, 3, lanes=8, batch_size=16)
    assert len(steps) == 1 and len(ids(steps[0])) == 3


def test_images_keep_their_shape_and_bytes(tmp_path: Path) -> None:
    snapshot = feature_table(tmp_path / "t", [9], contract_of(IMAGE))
    ((batch,),) = batches(snapshot, 1, lanes=1, batch_size=9)
    assert batch.tensors["image"].shape == (9, 4, 4) and batch.tensors["image"].dtype == torch.uint8


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """A table that another tool wrote: two files of several row groups, no row_id, no contract."""
    path = tmp_path_factory.mktemp("foreign") / "t"
    for first, rows in ((0, 100), (100, 45)):
        numbers = np.arange(first, first + rows)
        table = pa.table(
            {
                "n": pa.array(numbers, pa.int32()),
                "flag": pa.array(numbers % 2 == 0),
                "pair": pa.array([[float(n), -float(n)] for n in numbers], pa.list_(pa.float32())),
                "bytes": pa.array([bytes([n % 256] * 3) for n in numbers], pa.binary()),
            }
        )
        properties = WriterProperties(max_row_group_size=16)
        write_deltalake(str(path), table, mode="append", writer_properties=properties)
    return Snapshot.open(path)


def test_any_delta_table_streams_row_group_by_row_group(foreign: Snapshot) -> None:
    assert foreign.row_ids == "position" and len(shards_of(foreign)) == 7 + 3
    order = {"batch_size": 20, "lanes": 4, "window": 3}
    alone = batches(foreign, 1, **order)
    rows = {}
    for (batch,) in alone:
        tensors = batch.tensors
        assert tensors["n"].dtype == torch.int32 and tensors["flag"].dtype == torch.bool
        for n, row_id, flag, pair, three in zip(
            *(tensors[k].tolist() for k in ("n", "row_id", "flag", "pair", "bytes")), strict=True
        ):
            rows[n] = row_id
            assert flag == (n % 2 == 0) and pair == [n, -n] and three == [n % 256] * 3
    assert sorted(rows) == list(range(145)) and len(set(rows.values())) == 145
    receipt = EpochReceipt(foreign)
    for (batch,) in alone:
        receipt.add(batch)
    receipt.check(epoch=0)
    assert [ids(step) for step in batches(foreign, 3, **order)] == [ids(step) for step in alone]


@pytest.fixture
def shards_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that were read, by name."""
    read: list[str] = []

    def noting(shards: Any, columns: Any, **options: Any) -> Any:
        read.extend(map(str, shards))
        return read_shards(shards, columns, **options)

    monkeypatch.setattr(windows, "read_shards", noting)
    return read


def test_only_the_wanted_row_groups_are_read(foreign: Snapshot, shards_read: list[str]) -> None:
    batches(foreign, 1, batch_size=20, window=2)
    assert sorted(shards_read) == sorted(map(str, shards_of(foreign))), "each once"


def test_a_window_is_read_once_a_rank(snapshot: Snapshot, shards_read: list[str]) -> None:
    batches(snapshot, 1, lanes=6, batch_size=12, window=3)
    assert len(shards_read) == len(shards_of(snapshot))


def test_windows_share_their_memory_over_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, snapshot = [], feature_table(tmp_path / "t", [20] * 6, contract_of(DENSE))

    def noting(columns: Any, rows: int) -> Any:
        made.append(rows)
        return empty_arrays(columns, rows)

    monkeypatch.setattr(windows, "empty_arrays", noting)
    with LaneLoader(snapshot, 8, lanes=1, window=1, prefetch_mb=0, epochs=5) as loader:
        for _ in range(5):
            assert sum(batch.rows for batch in loader) == 120
    assert len(made) <= 7, "of 30 windows: the six of an epoch, and one read ahead"


def test_one_long_window_does_not_make_all_of_them_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    most = 0

    def noting(columns: Any, rows: int) -> Any:
        nonlocal most
        arrays = empty_arrays(columns, rows)
        alive.append(weakref.ref(arrays["row_id"]))
        most = max(most, sum(len(array) for ref in alive if (array := ref()) is not None))
        return arrays

    monkeypatch.setattr(windows, "empty_arrays", noting)
    snapshot = feature_table(tmp_path / "t", [400] + [10] * 20, contract_of(DENSE))
    with LaneLoader(snapshot, 8, lanes=1, window=1, prefetch_mb=0, epochs=20) as loader:
        for _ in range(20):
            assert sum(batch.rows for batch in loader) == 600
    assert most <= 2 * 600, "of 20 epochs, the windows of one and what is read ahead of the next"


def test_the_next_epoch_is_read_ahead(snapshot: Snapshot, shards_read: list[str]) -> None:
    with LaneLoader(snapshot, 16, window=2, epochs=2) as loader:
        for _ in loader:
            pass
        for _ in range(100):
            if len(shards_read) == 2 * len(shards_of(snapshot)):
                break
            time.sleep(0.05)
        assert len(shards_read) == 2 * len(shards_of(snapshot))
        assert sum(batch.rows for batch in loader) == 116
    assert len(shards_read) == 2 * len(shards_of(snapshot)), "no third epoch, and none twice"


def test_an_error_in_a_thread_reaches_the_caller(tmp_path: Path) -> None:
    snapshot = feature_table(tmp_path / "t", [20, 20, 20], contract_of(DENSE))
    gone = shards_of(snapshot)[2].path
    gone.unlink()
    with pytest.raises(DataError, match=gone.name):
        batches(snapshot, 1, lanes=2, batch_size=4, window=1)


def test_a_read_that_hangs_is_named(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = threading.Event()

    def hang(shards: Any, columns: Any, **options: Any) -> Any:
        hanging.wait(30)
        return read_shards(shards, columns, **options)

    monkeypatch.setattr(windows, "read_shards", hang)
    loader = LaneLoader(snapshot, 16, timeout_s=0.5)
    with pytest.raises(DataError, match=r"epoch 0, step 0: wanted rows within 0\.5 s, still reading .*part-.*parquet"):
        list(loader)
    hanging.set()


def test_closing_midway_ends_the_threads(snapshot: Snapshot) -> None:
    before = threading.active_count()
    for _ in range(5):
        loader = LaneLoader(snapshot, 4, lanes=4)
        next(iter(loader))
        loader.close()
        loader.close()
    for thread in threading.enumerate():
        if thread.name.startswith(("read", "lanes")):
            thread.join(timeout=5)
    assert threading.active_count() <= before


def test_lanes_that_do_not_fit_are_refused(snapshot: Snapshot) -> None:
    with pytest.raises(ValueError, match="divisible by 3 lanes"):
        LaneLoader(snapshot, 16, lanes=3)
    with pytest.raises(ValueError, match="at least as many lanes as ranks"):
        LaneLoader(snapshot, 16, lanes=2, rank=0, world_size=4)
