"""The lake: its folders, and Snapshot, a Delta table pinned at a version with its files, rows and contract."""

from pipelines.lake.contract import CONTRACT_KEY, Column, Contract, LabelSpec, Recommended
from pipelines.lake.paths import events_path, receipt_path, runs_path, scratch_path, table_path
from pipelines.lake.row_ids import ROW_ID, UINT64
from pipelines.lake.snapshot import File, Snapshot, commit_metadata

__all__ = [
    "CONTRACT_KEY",
    "ROW_ID",
    "UINT64",
    "Column",
    "Contract",
    "File",
    "LabelSpec",
    "Recommended",
    "Snapshot",
    "commit_metadata",
    "events_path",
    "receipt_path",
    "runs_path",
    "scratch_path",
    "table_path",
]
