"""Rows from a Snapshot to the ranks: each exactly once an epoch, in the same order at any number of ranks.

`from pipelines.stream import LaneLoader, EpochReceipt, Snapshot` is all that a loop of one's own needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.lake import Snapshot
    from pipelines.stream.batches import Batch
    from pipelines.stream.loader import LaneLoader
    from pipelines.stream.receipt import EpochReceipt

__all__ = ["Batch", "EpochReceipt", "LaneLoader", "Snapshot"]
_HOMES = {"Batch": "batches", "LaneLoader": "loader", "EpochReceipt": "receipt"}


def __getattr__(name: str) -> Any:
    """Import on first use, so that the plan alone needs neither torch nor petastorm."""
    if name == "Snapshot":
        return import_module("pipelines.lake").Snapshot
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
