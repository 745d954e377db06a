"""Run stages of a workload's file in this process, on the tests' Spark session."""

from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame, SparkSession

from pipelines.config import load_config
from pipelines.lake import Snapshot
from pipelines.receipt import Receipt
from pipelines.run import declared, run_stages
from pipelines.tables import read_table


def run(path: Path | str, *stages: str, overrides: tuple[str, ...] = ()) -> dict[str, Receipt]:
    """The receipts of the stages, all declared ones by default."""
    config = load_config(path, overrides)
    return run_stages(config, list(stages) or declared(config))


def features_of(spark: SparkSession, receipts: dict[str, Receipt], split: str) -> tuple[Snapshot, DataFrame]:
    """A split's Snapshot and its rows."""
    snapshot = Snapshot.model_validate(receipts["features"].result["snapshots"][split])
    return snapshot, read_table(spark, snapshot)


def ran(output: str) -> list[str]:
    """The stages that ran, by what was printed."""
    return [line.split()[0] for line in output.splitlines() if not line.startswith(" ") and " runs" in line]


def metrics_of(receipts: dict[str, Receipt], name: str) -> dict[str, Any]:
    """A candidate's test metrics."""
    return next(c["metrics"] for c in receipts["evaluate"].result["candidates"] if c["name"] == name)
