"""Where things lie in the lake: tables, receipts, checkpoints."""

from pathlib import Path

from pipelines.config.load import lake_root


def table_path(workload: str, name: str) -> Path:
    """Where a workload's Delta table lies."""
    return lake_root() / "tables" / workload / name


def runs_path(workload: str) -> Path:
    """Where a workload's receipts and checkpoints lie."""
    return lake_root() / "runs" / workload


def scratch_path(workload: str) -> Path:
    """Where a workload's run keeps files for a while; the next run removes what a killed one left."""
    path = lake_root() / "tmp" / workload
    path.mkdir(parents=True, exist_ok=True)
    return path


def receipt_path(workload: str, stage: str) -> Path:
    """Where a stage leaves its receipt."""
    return runs_path(workload) / f"{stage}.json"


def events_path(workload: str) -> Path:
    """Where Spark leaves the event logs of a workload's stages."""
    return lake_root() / "logs" / "spark" / workload
