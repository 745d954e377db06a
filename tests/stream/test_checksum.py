"""A file that is damaged, or changes under a running epoch, is named; no wrong row is given."""

import os
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from pipelines.errors import DataError
from pipelines.lake import Column, Snapshot
from pipelines.stream import LaneLoader, checksum
from pipelines.stream.checksum import look_through
from pipelines.stream.reader import read_shards
from pipelines.stream.shards import shards_of
from tests.tables import DENSE, contract_of, feature_table

COLUMNS = [
    Column(name="row_id", kind="row_id", dtype="int64"),
    Column(name="x", kind="dense", dtype="float32", shape=(3,)),
    Column(name="label", kind="label", dtype="int64"),
]
FLIPS = 100


@pytest.fixture(scope="module")
def table(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table as Spark writes it: its pages carry checksums."""
    path = tmp_path_factory.mktemp("checksum") / "t"
    x = "array(float(rand(1)), float(rand(2)), float(rand(3))) x"
    rows = spark.range(3000).selectExpr("id as row_id", x, "id % 2 label")
    rows.repartition(3).write.format("delta").save(str(path))
    return path


@pytest.fixture
def snapshot(table: Path, tmp_path: Path) -> Snapshot:
    return Snapshot.open(shutil.copytree(table, tmp_path / "t"))


def flip(path: Path, at: int) -> None:
    """Change a bit, in place."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << at % 8]))


def test_a_flipped_bit_anywhere_in_the_pages_is_found(snapshot: Snapshot) -> None:
    shard = shards_of(snapshot)[0]
    wanted = pa.table(pq.ParquetFile(shard.path).read())
    metadata = pq.ParquetFile(shard.path).metadata
    end = shard.path.stat().st_size - metadata.serialized_size - 8
    generator = random.Random(0)
    for at in (generator.randrange(4, end) for _ in range(FLIPS)):
        flip(shard.path, at)
        try:
            read_shards([shard], COLUMNS)
        except DataError as error:
            assert str(shard.path) in str(error)
        else:
            assert pq.ParquetFile(shard.path).read().equals(wanted), f"byte {at}: of no matter to the rows"
        flip(shard.path, at)
    assert len(read_shards([shard], COLUMNS)["row_id"]) == shard.rows


def test_checksums_are_seen_where_there_are_some(snapshot: Snapshot, tmp_path: Path) -> None:
    path = snapshot.paths()[0]
    names = [column.name for column in COLUMNS]
    assert look_through(path, pq.ParquetFile(path).metadata, 0, names) == (True, None)
    plain = tmp_path / "plain.parquet"
    pq.write_table(pq.ParquetFile(path).read(), plain)
    assert look_through(plain, pq.ParquetFile(plain).metadata, 0, names) == (False, None)


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_in_the_middle(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


@pytest.mark.parametrize("harm", [remove, truncate, flip_in_the_middle])
@pytest.mark.parametrize("by", ["spark", "pyarrow"])
def test_a_file_harmed_under_a_running_epoch_is_named(
    snapshot: Snapshot, tmp_path: Path, harm: Callable[[Path], None], by: str
) -> None:
    if by == "pyarrow":  # without checksums
        snapshot = feature_table(tmp_path / "p", [200] * 8, contract_of(DENSE))
    shards = shards_of(snapshot)
    whole = {int(i) for i in read_shards(shards, COLUMNS[:1])["row_id"]}
    seen: list[int] = []
    with LaneLoader(snapshot, 50, lanes=2, epochs=6, prefetch_mb=1) as loader, pytest.raises(DataError) as caught:
        for epoch in range(6):
            for batch in loader:
                if (epoch, batch.step) == (1, 3):
                    harm(shards[-1].path)
                seen += batch.tensors["row_id"].tolist()
    assert str(shards[-1].path) in str(caught.value)
    assert set(seen) <= whole


@pytest.mark.parametrize("harm", [remove, truncate, flip_in_the_middle])
def test_of_files_that_are_read_together_the_harmed_one_is_named(
    snapshot: Snapshot, harm: Callable[[Path], None]
) -> None:
    shards = shards_of(snapshot)
    harm(shards[1].path)
    with pytest.raises(DataError, match=f"^{shards[1].path}"):
        read_shards(shards, COLUMNS)


def test_a_file_restored_from_a_copy_goes_on(snapshot: Snapshot, tmp_path: Path) -> None:
    shard = shards_of(snapshot)[0]
    copy = Path(shutil.copy(shard.path, tmp_path / "copy"))
    before = read_shards([shard], COLUMNS)["row_id"].tolist()
    shard.path.unlink()
    shutil.copy(copy, shard.path)
    assert read_shards([shard], COLUMNS)["row_id"].tolist() == before


def test_another_thread_may_look_through_the_same_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where an epoch ends with the file that the next begins with; without checksums, only the file's time tells."""
    shards, reads = shards_of(feature_table(tmp_path / "t", [20], contract_of(DENSE))), []

    def look_while_another_does(*given: Any) -> tuple[bool, str | None]:
        found = look_through(*given)
        if not reads:
            reads.append("another")
            with ThreadPoolExecutor() as pool:
                pool.submit(read_shards, shards, COLUMNS[:1]).result()
        return found

    monkeypatch.setattr(checksum, "look_through", look_while_another_does)
    assert len(read_shards(shards, COLUMNS[:1])["row_id"]) == 20
    assert reads == ["another"]
