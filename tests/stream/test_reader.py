"""The reader delivers what the plan counts on, or says which file does not."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import DataError
from pipelines.lake import Column, Snapshot
from pipelines.stream import reader
from pipelines.stream.reader import read_shards
from pipelines.stream.shards import Shard, shards_of
from tests.tables import DENSE, IDS, IMAGE, LABEL, ROW_ID, SPARSE, contract_of, feature_table

COLUMNS = [ROW_ID, DENSE, IDS, IMAGE, *SPARSE, LABEL]


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    return feature_table(tmp_path / "t", [50, 1, 30], contract_of(DENSE, IDS, IMAGE, *SPARSE))


def test_arrays_are_what_pyarrow_reads(snapshot: Snapshot) -> None:
    shards = shards_of(snapshot)
    arrays = read_shards(shards, COLUMNS)
    table = pa.concat_tables([pq.ParquetFile(shard.path).read() for shard in shards])
    for column in COLUMNS:
        array = arrays[column.name]
        assert array.shape == (81, *column.shape) and array.dtype == column.dtype, column.name
        values = table.column(column.name).to_pylist()
        wanted = [list(value) if isinstance(value, bytes) else value for value in values]
        np.testing.assert_array_equal(array.reshape(81, -1), np.array(wanted).reshape(81, -1))


def test_order_of_the_list_is_kept(snapshot: Snapshot) -> None:
    shards = shards_of(snapshot)
    forth, back = read_shards(shards, [ROW_ID])["row_id"], read_shards(shards[::-1], [ROW_ID])["row_id"]
    parts = np.split(forth, np.cumsum([shard.rows for shard in shards])[:-1])
    np.testing.assert_array_equal(back, np.concatenate(parts[::-1]))


def test_a_thousand_epochs_over_tiny_files_lose_nothing(tmp_path: Path) -> None:
    snapshot = feature_table(tmp_path / "t", [3, 1, 2, 4], contract_of(DENSE))
    shards = shards_of(snapshot)
    wanted = read_shards(shards, [ROW_ID])["row_id"].tolist()
    for _ in range(1000):
        assert read_shards(shards, [ROW_ID])["row_id"].tolist() == wanted


def test_a_path_with_odd_characters(tmp_path: Path) -> None:
    snapshot = feature_table(tmp_path / "a b+ü", [5], contract_of(DENSE))
    assert len(read_shards(shards_of(snapshot), [ROW_ID])["row_id"]) == 5


def patched(monkeypatch: pytest.MonkeyPatch, change: Any) -> list[int]:
    """Have Petastorm's worker change what it loads; gives the number of calls."""
    calls = [0]
    load = reader.ArrowReaderWorker._load_rows

    def load_rows(self: Any, *arguments: Any) -> Any:
        calls[0] += 1
        return change(load(self, *arguments), calls[0])

    monkeypatch.setattr(reader.ArrowReaderWorker, "_load_rows", load_rows)
    return calls


def test_a_short_read_is_read_again(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = read_shards(shards_of(snapshot), [ROW_ID])["row_id"].tolist()
    calls = patched(monkeypatch, lambda table, call: table.slice(1) if call == 1 else table)
    assert read_shards(shards_of(snapshot), [ROW_ID])["row_id"].tolist() == wanted
    assert calls[0] > 3


@pytest.mark.parametrize(
    "change", [lambda table, _: table.slice(1), lambda table, _: pa.concat_tables([table, table.slice(0, 1)])]
)
def test_rows_dropped_or_repeated_twice_fail_by_name(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    patched(monkeypatch, change)
    first = shards_of(snapshot)[0]
    with pytest.raises(
        DataError, match=rf"{first.path}: wanted {first.rows} rows by the Snapshot, seen .* in two reads"
    ):
        read_shards(shards_of(snapshot), [ROW_ID])


@pytest.mark.parametrize("how", ["drop", "repeat", "reorder"])
def test_row_groups_dropped_repeated_or_reordered_are_caught(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """By name, whatever their rows: three files with as many rows each would pass a count."""
    process = reader.ArrowReaderWorker.process

    def altered(self: Any, piece_index: int, **rest: Any) -> None:
        if how != "drop" or piece_index:
            process(self, 2 - piece_index if how == "reorder" else piece_index, **rest)
        if how == "repeat":
            process(self, piece_index, **rest)

    monkeypatch.setattr(reader.ArrowReaderWorker, "process", altered)
    with pytest.raises(DataError, match=r"part-.*: wanted it next, seen .*part-.* in two reads"):
        read_shards(shards_of(snapshot), [ROW_ID])


def test_a_worker_that_raises_fails_the_read(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no such disk")

    monkeypatch.setattr(reader.ArrowReaderWorker, "process", fail)
    with pytest.raises(DataError, match=r"part-.*cannot be read: no such disk"):
        read_shards(shards_of(snapshot), [ROW_ID])


def test_a_file_that_is_gone_or_damaged_is_named(snapshot: Snapshot) -> None:
    shard = shards_of(snapshot)[1]
    content = shard.path.read_bytes()
    shard.path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        read_shards([shard], [ROW_ID])
    shard.path.unlink()
    with pytest.raises(DataError, match=shard.path.name):
        read_shards([shard], [ROW_ID])


def write(path: Path, column: pa.Array) -> list[Shard]:
    pq.write_table(pa.table({"x": column}), path)
    return [Shard(path, len(column))]


@pytest.mark.parametrize(
    ("values", "shape", "part"),
    [
        (pa.array([[1.0, 2.0], [1.0]], pa.list_(pa.float32())), (2,), "wanted 2 elements a row, seen 1 to 2"),
        (pa.array([[1.0, None], [1.0, 2.0]], pa.list_(pa.float32())), (2,), "no nulls in its lists, seen 1"),
        (pa.array([[1.0, 2.0], None], pa.list_(pa.float32())), (2,), "no nulls, seen 1"),
        (pa.array([1.0, None], pa.float32()), (), "no nulls, seen 1"),
        (pa.array([1, 2], pa.int32()), (), "wanted float32, seen int32"),
        (pa.array([[1, 2], [3, 4]], pa.list_(pa.int64())), (2,), "wanted float32, seen int64"),
    ],
)
def test_columns_that_do_not_fit_the_contract(tmp_path: Path, values: pa.Array, shape: Any, part: str) -> None:
    column = Column(name="x", kind="dense", dtype="float32", shape=shape)
    with pytest.raises(DataError, match="column 'x'") as caught:
        read_shards(write(tmp_path / "x.parquet", values), [column])
    assert part in str(caught.value)


def test_bytes_of_another_length(tmp_path: Path) -> None:
    shards = write(tmp_path / "x.parquet", pa.array([b"1234", b"123"]))
    with pytest.raises(DataError, match="wanted 4 bytes a row, seen 3 to 4"):
        read_shards(shards, [Column(name="x", kind="image", dtype="uint8", shape=(2, 2))])


def test_a_planted_common_metadata_is_not_opened(snapshot: Snapshot) -> None:
    (Path(snapshot.table) / "_common_metadata").write_bytes(b"not Parquet: opening it would raise")
    assert len(read_shards(shards_of(snapshot), [ROW_ID])["row_id"]) == 81


def test_reading_is_quiet(snapshot: Snapshot, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"petastorm|pyarrow")
        read_shards(shards_of(snapshot), [ROW_ID])
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
