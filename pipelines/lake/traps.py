"""Traps: what makes a Delta table unfit to be streamed, each with the command that mends it.

Some would give other rows than the table has, some would fail late; `make plan` names them all before anything runs.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pyarrow.parquet as pq

from pipelines.lake.columns import describe
from pipelines.lake.snapshot import Snapshot, rewrite_command

_SUMMARIES = ("_common_metadata", "_metadata")


@dataclass(frozen=True)
class Trap:
    """What was found, and the command that mends it."""

    found: str
    fix: str

    def __str__(self) -> str:
        return f"{self.found}; {self.fix}"


def traps_of(snapshot: Snapshot) -> list[Trap]:
    """Everything about the table's columns and folder that must be mended first."""
    table = Path(snapshot.table)
    if missing := snapshot.missing():
        return [Trap(f"{missing[0]}: gone, or of another size", "restore it, or write the table again")]
    _, problems = describe(snapshot)
    found = [Trap(f"{table} version {snapshot.version}: {p}", rewrite_command(table)) for p in problems]
    found += [
        Trap(f"{table / name}: Petastorm would unpickle, so execute, what it holds", f"rm {table / name}")
        for name in _SUMMARIES
        if (table / name).exists()
    ]
    found += [
        Trap(f"{path}: belongs to no version of the table (an uncommitted or planted file)", f"rm {path}")
        for path in _strangers(table)
    ]
    return found


def _strangers(table: Path) -> list[Path]:
    """Parquet files in the folder that no entry of the Delta log has ever named."""
    known = set(_logged(table / "_delta_log"))
    return sorted(path for path in table.rglob("*.parquet") if _is_data(path, table) and path not in known)


def _is_data(path: Path, table: Path) -> bool:
    return not any(part.startswith("_") for part in path.relative_to(table).parts[:-1])


def _logged(log: Path) -> Iterator[Path]:
    for commit in log.glob("*.json"):
        for line in commit.read_text(encoding="utf-8").splitlines():
            action = json.loads(line)
            for kind in ("add", "remove"):
                if kind in action:
                    yield log.parent / unquote(action[kind]["path"])
    for checkpoint in log.glob("*.checkpoint*.parquet"):
        for kind in ("add", "remove"):
            for entry in pq.read_table(checkpoint, columns=[f"{kind}.path"]).column(kind).to_pylist():
                if entry is not None and entry["path"]:
                    yield log.parent / unquote(entry["path"])
