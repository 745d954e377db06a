"""The driver's memory over the whole chain, 100 k rows against 1 M.

    python -m benchmarks.driver_memory

Each size runs in a process of its own, with all stages; at the end the JVM's heap, once collections free no more, and
the Python process's peak are read. In local mode the executors are in the driver's JVM, so what they keep counts as
well.
"""

import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from benchmarks.report import Figure, at_most, report, use_lake

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

SIZES = (100_000, 1_000_000)
BOUND = 1.1
SETTLED = 5  # collections that free nothing more
NUMBERS = [f"n{i}" for i in range(8)]


def workload(lake: Path, name: str) -> Path:
    """The config of the generated rows."""
    config: dict[str, Any] = {
        "workload": name,
        "source": {
            "format": "parquet",
            "paths": str(lake / f"{name}-raw" / "*.parquet"),
            "schema": {"id": "bigint"} | dict.fromkeys(NUMBERS, "double") | {"color": "string", "y": "int"},
            "key": ["id"],
        },
        "split": {"hash": {}, "validation": {"share": 0.1}},
        "features": {
            "label": {"column": "y", "kind": "binary", "positive": [1], "negative": [0]},
            "inputs": {
                "dense": {"columns": NUMBERS, "steps": ["impute_mean", "standardize"]},
                "ids": {"columns": ["color"], "steps": ["vocabulary"]},
            },
        },
        "classic": [{"estimator": "LogisticRegression", "maxIter": 10}],
        "model": {"network": "mlp", "hidden": [16]},
        "train": {"ranks": 2, "batch_size": 4096, "epochs": 1},
    }
    path = lake / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def settled_heap(spark: "SparkSession") -> int:
    """Bytes in use once collections free no more.

    One collection is not enough: Spark's cleaner lets go of broadcasts and shuffles only after the collection that
    found them unreachable, and what they held is freed by a later one.
    """
    java: Any = spark.sparkContext._jvm.java.lang  # type: ignore[union-attr]
    runtime = java.Runtime.getRuntime()
    seen: list[int] = []
    while len(seen) < SETTLED or min(seen[:-SETTLED], default=math.inf) > 1.01 * min(seen[-SETTLED:]):
        java.System.gc()
        time.sleep(1)
        seen.append(runtime.totalMemory() - runtime.freeMemory())
        print(f"heap after collection {len(seen)}: {seen[-1] / 1e6:.1f} MB", file=sys.stderr)
    return min(seen)


def measure(rows: int) -> None:
    """Run the chain on `rows` rows and print the figures as JSON, in the last line."""
    lake = use_lake("driver_memory")
    name = f"rows_{rows}"
    from pyspark.sql import functions as F

    from pipelines.config import load_config
    from pipelines.lake import runs_path
    from pipelines.run import declared, run_stages
    from pipelines.session import get_session, stop_session

    config = load_config(workload(lake, name))
    spark = get_session(config)
    numbers = [F.randn(seed=i).alias(column) for i, column in enumerate(NUMBERS)]
    color = F.element_at(F.array(F.lit("red"), F.lit("green"), F.lit("blue")), (F.rand(seed=90) * 3).cast("int") + 1)
    frame = spark.range(0, rows, numPartitions=8).select("id", *numbers, color.alias("color"))
    frame = frame.withColumn("y", (F.col("n0") + F.col("n1") + F.randn(seed=91) > 0).cast("int"))
    frame.write.mode("overwrite").parquet(str(lake / f"{name}-raw"))
    for receipt in runs_path(name).glob("*.json"):
        receipt.unlink()
    run_stages(config, declared(config))
    heap = settled_heap(spark)
    stop_session()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"heap_mb": heap / 1e6, "python_peak_mb": peak / 1e6}))


def main() -> int:
    """Returns the exit code."""
    seen = []
    for rows in SIZES:
        command = [sys.executable, "-m", "benchmarks.driver_memory", str(rows)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        seen.append(json.loads(done.stdout.splitlines()[-1]))
    figures = []
    for key, what in (("heap_mb", "jvm_heap_after_gc"), ("python_peak_mb", "python_peak")):
        small, large = (values[key] for values in seen)
        figures += [
            Figure(f"driver_memory.{what}.100k", small, "MB"),
            Figure(f"driver_memory.{what}.1m", large, "MB"),
            at_most(f"driver_memory.{what}.ratio", large / small, "x", BOUND),
        ]
    return report("driver_memory", figures)


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[1])
    if len(sys.argv) > 1:
        measure(int(sys.argv[1]))
    else:
        sys.exit(main())
