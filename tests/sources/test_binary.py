"""IDX, Parquet and Delta sources."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from pyspark.sql import SparkSession

from pipelines.cli import explain
from pipelines.config import load_config
from pipelines.config.data import Source
from pipelines.errors import DataError, LakeError
from pipelines.ingest import parse
from pipelines.sources import idx
from pipelines.sources.prepare import prepare

PIXELS = np.arange(5 * 6, dtype=np.uint8).reshape(5, 2, 3)
LABELS = bytes([3, 1, 4, 1, 5])


def write_idx(folder: Path, *, zipped: bool, images: bytes = PIXELS.tobytes(), labels: bytes = LABELS) -> Path:
    end = ".gz" if zipped else ""
    pack = gzip.compress if zipped else bytes
    path = folder / f"some-images-idx3-ubyte{end}"
    path.write_bytes(pack(struct.pack(">4I", 0x803, 5, 2, 3) + images))
    (folder / f"some-labels-idx1-ubyte{end}").write_bytes(pack(struct.pack(">2I", 0x801, len(labels)) + labels))
    return path


def source_of(path: Path) -> Source:
    return Source.model_validate({"format": "idx", "paths": str(path), "schema": "image binary, digit int"})


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_rows(spark: SparkSession, tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idx, "_TASK_ROWS", 2)  # several ranges of one file
    path = write_idx(tmp_path, zipped=zipped)
    rows = parse(spark, source_of(path)).orderBy("_line").collect()
    assert [row["digit"] for row in rows] == list(LABELS) and [row["_line"] for row in rows] == [1, 2, 3, 4, 5]
    assert [bytes(row["image"]) for row in rows] == [image.tobytes() for image in PIXELS]
    assert {row["_file"] for row in rows} == {path.name}


def failure(spark: SparkSession, path: Path) -> str:
    """What a user is told when the source is read."""
    try:
        parse(spark, source_of(path)).collect()
    except Exception as error:
        known = explain(error)
        assert isinstance(known, DataError), known
        return str(known)
    raise AssertionError("nothing was refused")


def test_idx_files_that_are_damaged(spark: SparkSession, tmp_path: Path) -> None:
    path = write_idx(tmp_path, zipped=False, images=PIXELS.tobytes()[:-1])
    assert "some-images-idx3-ubyte: the IDX file is cut short: wanted 46 bytes, seen 45" in failure(spark, path)
    path = write_idx(tmp_path, zipped=True, images=PIXELS.tobytes()[:-1])
    assert "cut short: wanted 30 bytes, seen 29; fetch the file again" in failure(spark, path)
    path = write_idx(tmp_path, zipped=True)
    path.write_bytes(path.read_bytes()[:-12])
    assert "the gzip stream is damaged or cut short" in failure(spark, path)
    path.write_bytes(b"not gzip at all")
    assert "the gzip stream is damaged or cut short" in failure(spark, path)
    path.write_bytes(gzip.compress(b"\0" * 40))
    assert "wanted an IDX file with magic number 0x803, seen 0x0" in failure(spark, path)
    path = write_idx(tmp_path, zipped=True, labels=LABELS[:-1])
    assert "5 images, but some-labels-idx1-ubyte.gz holds 4 labels" in failure(spark, path)
    (tmp_path / "some-labels-idx1-ubyte.gz").unlink()
    assert "labels-idx1... beside it, seen none" in failure(spark, path)


def parquet_source(path: Path, schema: str, **more: object) -> Source:
    return Source.model_validate({"format": "parquet", "paths": str(path), "schema": schema, **more})


def test_parquet_rows_and_reasons(spark: SparkSession, tmp_path: Path) -> None:
    for name, values in (("a", [1.0, float("nan")]), ("b", [None, float("inf")])):
        table = pa.table({"x": pa.array(values, pa.float64()), "n": pa.array([1, 2]), "extra": ["", ""]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    rows = parse(spark, parquet_source(tmp_path, "x double, n bigint")).orderBy("_file", "_line").collect()
    assert [(row["_file"], row["_line"], row["_reason"]) for row in rows] == [
        ("a.parquet", 1, None),
        ("a.parquet", 2, "x: wanted a finite number, seen NaN"),
        ("b.parquet", 1, None),
        ("b.parquet", 2, "x: wanted a finite number, seen Infinity"),
    ]
    assert "extra" not in rows[0].asDict()


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("x double, m int", "wanted a column 'm', seen x, n"),
        ("x float", "column 'x': wanted float, seen double"),
        ("n int", "column 'n': wanted int, seen int64"),
        ("n array<bigint>", "column 'n': wanted array<bigint>, seen int64"),
    ],
)
def test_parquet_columns_are_never_inferred(spark: SparkSession, tmp_path: Path, schema: str, message: str) -> None:
    pq.write_table(pa.table({"x": [1.0], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        parse(spark, parquet_source(tmp_path, schema))


def test_a_file_that_is_not_parquet(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"hello")
    with pytest.raises(DataError, match=r"a\.parquet: wanted a Parquet file"):
        parse(spark, parquet_source(tmp_path, "x double"))


def test_delta_is_pinned(spark: SparkSession, tmp_path: Path) -> None:
    for part in ([1, 2], [3]):
        write_deltalake(str(tmp_path / "t"), pa.table({"x": part}), mode="append")

    def values(**options: int) -> list[int]:
        source = Source.model_validate(
            {"format": "delta", "paths": str(tmp_path / "t"), "schema": "x bigint", "options": options}
        )
        return sorted(row["x"] for row in parse(spark, source).collect())

    assert values() == [1, 2, 3] and values(version=0) == [1, 2]
    with pytest.raises(LakeError, match="wanted version 5"):
        values(version=5)


def test_the_digits_are_scikit_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spark: SparkSession) -> None:
    monkeypatch.setenv("HEADRACE_LAKE", str(tmp_path))
    config = load_config("conf/digits.yaml")
    prepare(config)
    rows = parse(spark, config.source).orderBy("_line").collect()
    from sklearn.datasets import load_digits

    data = load_digits()
    assert [row["digit"] for row in rows] == data.target.tolist()
    pixels = np.stack([np.frombuffer(row["image"], np.uint8) for row in rows])
    np.testing.assert_allclose(pixels / 255 * 16, data.data, atol=0.04)
