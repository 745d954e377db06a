"""How unequal files are dealt to scoring tasks: by Spark, and by `pipelines.tables.read_dealt`.

    python -m benchmarks.file_tasks

Rows on the busier of two cores over an even share, for tables of 12 files of very unequal size; then the seconds in which
one of them goes through a convolutional network, in turn by both, the median of the rounds.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from deltalake import write_deltalake

from benchmarks.report import Figure, at_least, report, use_lake

SIDE, CORES, ROUNDS = 28, 2, 3
TABLES = {
    "small": [30_000, 18_000, 12_000, 6_000] + [1_000] * 8,
    "one_large": [400_000] + [10_000] * 11,
    "geometric": [int(300_000 * 0.6**k) + 500 for k in range(12)],
}
TIMED = "small"


def write(path: Path, rows: Sequence[int]) -> None:
    """A Delta table with a file of each number of rows, pictures as bytes with much white."""
    generator = np.random.default_rng(0)
    for number, num in enumerate(rows):
        pixels = generator.integers(0, 256, (num, SIDE * SIDE), dtype=np.uint8)
        pixels[:, : SIDE * SIDE * 3 // 4] = 0
        images = pa.FixedSizeBinaryArray.from_buffers(pa.binary(SIDE * SIDE), num, [None, pa.py_buffer(pixels)])
        table = pa.table({"row_id": pa.array(np.arange(num)), "x": images.cast(pa.binary())})
        write_deltalake(str(path), table, mode="append" if number else "overwrite")


def busiest(tasks: Sequence[int]) -> float:
    """Rows of the core that has most, over an even share; each free core takes the next task."""
    load = [0] * CORES
    for rows in tasks:
        load[load.index(min(load))] += rows
    return max(load) * CORES / sum(load)


def convolve(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """What a small convolutional network makes of each picture, one number."""
    import torch

    torch.set_num_threads(1)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 3))
    with torch.inference_mode():
        for batch in batches:
            for part in (batch.slice(start, 500) for start in range(0, batch.num_rows, 500)):
                pixels = np.frombuffer(b"".join(part.column("x").to_pylist()), np.uint8).reshape(-1, 1, SIDE, SIDE)
                seen = network(torch.from_numpy(pixels.astype(np.float32))).mean((1, 2, 3))
                yield pa.RecordBatch.from_arrays([pa.array(seen.numpy().astype(np.float64))], ["y"])


def main() -> int:
    """Returns the exit code."""
    lake = use_lake("file_tasks")
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql import functions as F

    from pipelines.config import load_config
    from pipelines.lake import Snapshot
    from pipelines.session import get_session, stop_session
    from pipelines.tables import read_dealt, read_table

    spark = get_session(load_config("conf/digits.yaml"))
    figures, ways = [], dict[str, Callable[[SparkSession, Snapshot], DataFrame]](spark=read_table, dealt=read_dealt)
    for name, rows in TABLES.items():
        write(lake / name, rows)
        snapshot = Snapshot.open(lake / name)
        for how, read in ways.items():
            counted = read(spark, snapshot).groupBy(F.spark_partition_id().alias("task")).count()
            tasks = counted.orderBy("task").toArrow().column("count").to_pylist()
            figures.append(Figure(f"file_tasks.{name}.{how}", busiest(tasks), "x"))
    snapshot, seconds = Snapshot.open(lake / TIMED), dict[str, list[float]](spark=[], dealt=[])
    for _ in range(ROUNDS + 1):
        for how, read in ways.items():
            started = time.perf_counter()
            read(spark, snapshot).mapInArrow(convolve, "y double").write.format("noop").mode("overwrite").save()
            seconds[how].append(time.perf_counter() - started)
    median = {how: statistics.median(found[1:]) for how, found in seconds.items()}  # the first starts the workers
    figures += [Figure(f"file_tasks.{TIMED}.{how}.seconds", value, "s") for how, value in median.items()]
    figures.append(at_least("file_tasks.gain", median["spark"] / median["dealt"], "x", 1.2))
    stop_session()
    return report("file_tasks", figures)


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[1])
    sys.exit(main())
