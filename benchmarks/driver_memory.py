"""The driver's memory over the whole chain, 100 k rows against 1 M.

    python -m benchmarks.driver_memory

Each size runs in a process of its own, with all stages; at the end the JVM's heap after a collection and the Python
process's peak are read. In local mode the executors are in the driver's JVM, so what they keep counts as well.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.report import Figure, at_most, report, use_lake

SIZES = (100_000, 1_000_000)
BOUND = 1.1
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
    runtime: Any = spark.sparkContext._jvm.java.lang  # type: ignore[union-attr]
    for _ in range(3):
        runtime.System.gc()
    heap = runtime.Runtime.getRuntime().totalMemory() - runtime.Runtime.getRuntime().freeMemory()
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
