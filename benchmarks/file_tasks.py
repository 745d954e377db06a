"""How Spark deals unequal files to scoring tasks, and how even it could be.

    python -m benchmarks.file_tasks

Rows on the busier of two cores over an even share, for tables of 12 files of very unequal size: as Spark packs them, with
`spark.sql.files.openCostInBytes` at 64 kB instead of its 4 MB, and as `pipelines.assignment.partition` would group them
by bytes. Rows are counted, nothing is timed.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from deltalake import write_deltalake

from benchmarks.report import Figure, report, use_lake

WIDTH, CORES = 32, 2
TABLES = {
    "small": [50_000, 30_000, 20_000, 10_000] + [1_000] * 8,
    "one_large": [400_000] + [10_000] * 11,
    "geometric": [int(600_000 * 0.6**k) + 500 for k in range(12)],
}


def write(path: Path, rows: Sequence[int]) -> None:
    """A Delta table with a file of each number of rows."""
    generator = np.random.default_rng(0)
    for number, num in enumerate(rows):
        values = pa.array(generator.normal(size=num * WIDTH).astype(np.float32))
        lists = pa.ListArray.from_arrays(pa.array(np.arange(num + 1, dtype=np.int32) * WIDTH), values)
        table = pa.table({"row_id": pa.array(np.arange(num)), "x": lists})
        write_deltalake(str(path), table, mode="append" if number else "overwrite")


def busiest(tasks: Sequence[int]) -> float:
    """Rows of the core that has most, over an even share; each free core takes the next task."""
    load = [0] * CORES
    for rows in tasks:
        load[load.index(min(load))] += rows
    return max(load) * CORES / sum(load)


def main() -> int:
    """Returns the exit code."""
    lake = use_lake("file_tasks")
    from pyspark.sql import functions as F

    from pipelines.assignment import partition
    from pipelines.config import load_config
    from pipelines.lake import Snapshot
    from pipelines.session import get_session, stop_session
    from pipelines.tables import read_table

    spark = get_session(load_config("conf/digits.yaml"))
    figures = []
    for name, rows in TABLES.items():
        write(lake / name, rows)
        snapshot = Snapshot.open(lake / name)
        for how, cost in (("spark", "4m"), ("open_cost_64k", "64k")):
            spark.conf.set("spark.sql.files.openCostInBytes", cost)
            counted = read_table(spark, snapshot).groupBy(F.spark_partition_id().alias("task")).count()
            tasks = counted.orderBy("task").toArrow().column("count").to_pylist()
            figures.append(Figure(f"file_tasks.{name}.{how}", busiest(tasks), "x"))
        found = partition([file.bytes for file in snapshot.files], CORES)
        groups = [sum(snapshot.files[file].rows for file in found.tasks_of(core)) for core in range(CORES)]
        figures.append(Figure(f"file_tasks.{name}.partition", busiest(groups), "x"))
    stop_session()
    return report("file_tasks", figures)


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[1])
    sys.exit(main())
