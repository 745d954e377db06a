"""The tables that loaders are measured on, made once under `build/bench/lakes/loader`; random, seed 0."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import write_deltalake

from benchmarks.report import FOLDER

ROOT = FOLDER / "lakes" / "loader"
ROWS = 1_000_000
TABLES = ("f16", "image", "ctr")
_FILE_ROWS = {"f16": 50_000, "image": 20_000, "ctr": 50_000}


def path_of(name: str, *, rows: int = ROWS, as_lists: bool = False) -> Path:
    """A Delta table, made where it is missing.

    Args:
        name: f16: 16 float32; image: 784 uint8; ctr: 13 float32 and 26 int64; each with a label.
        rows: How many.
        as_lists: Images as lists, for loaders that cannot read binary.
    """
    path = ROOT / f"{name}-{rows}{'-lists' if as_lists else ''}"
    if (path / "done").is_file():
        return path
    generator = np.random.default_rng(0)
    size = min(_FILE_ROWS[name], rows)
    path.mkdir(parents=True, exist_ok=True)
    for number in range(rows // size):
        table = pa.table(_columns(name, size, generator, as_lists=as_lists))
        if as_lists:  # Delta has no lists of uint8
            pq.write_table(table, path / f"part-{number:05}.parquet")
        else:
            write_deltalake(str(path), table, mode="append")
    (path / "done").touch()
    return path


def _columns(name: str, rows: int, generator: np.random.Generator, *, as_lists: bool) -> dict[str, pa.Array]:
    label = pa.array(generator.integers(0, 2, rows))
    if name == "image":
        pixels = generator.integers(0, 256, (rows, 784), dtype=np.uint8)
        images = _lists(pixels) if as_lists else pa.array([row.tobytes() for row in pixels], pa.binary())
        return {"image": images, "label": label}
    if name == "ctr":
        numbers, ids = generator.normal(size=(rows, 13)), generator.integers(0, 100_000, (rows, 26))
        return {"numbers": _lists(numbers.astype(np.float32)), "ids": _lists(ids), "label": label}
    return {"x": _lists(generator.normal(size=(rows, 16)).astype(np.float32)), "label": label}


def _lists(values: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> pa.Array:
    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.ravel()))
