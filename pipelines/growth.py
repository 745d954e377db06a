"""What the raw table was read from, kept with its rows, so that a source that grew by files is read where it grew.

The record of a version is a JSON file beside the table, named by its digest, and the commit of the rows names it. So
rows and record change together: whenever a run is killed, the next one finds the files whose rows the table holds, and
no others.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines.card import Card
from pipelines.checks import Violation
from pipelines.config.data import Source
from pipelines.lake import commit_metadata
from pipelines.lake.contract import Frozen
from pipelines.receipt import changed, digest_of, file_marks, write_json
from pipelines.sources.files import raw_files, root_of
from pipelines.tables import current_version

INGESTED_KEY = "headrace.ingested"
_RAW_FILES = "raw files"  # the part of what a stage is made from that may grow


class Ingested(Frozen):
    """What a version of the raw table holds.

    Attributes:
        made_from: What its rows depend on beside the raw files, by part.
        files: The mark of each raw file, by split and relative path.
        columns: The declared columns and their types.
        row_id_sum: Sum of `row_id` modulo 2^64.
        rejects_version: The version of the reject table that belongs to it; None where there is no such table.
        violations: Of all constraints but freshness, which changes without the rows.
        card: The data card.
    """

    made_from: dict[str, str]
    files: dict[str, dict[str, str]]
    columns: dict[str, str]
    rows_read: int
    rows_rejected: int
    row_id_sum: int
    rejects_version: int | None
    violations: tuple[Violation, ...]
    card: Card

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return self.rows_read - self.rows_rejected


@dataclass(frozen=True)
class Reading:
    """Which raw files a run of the stage reads.

    Attributes:
        files: Those to read, by split.
        marks: The mark of each file of the source, by split and relative path.
        last: What the table holds now; None where there is none, or no record of it.
        base: The same where what is read is added to it; None where it takes its place.
        why: What is read and why, for the user.
    """

    files: dict[str, list[Path]]
    marks: dict[str, dict[str, str]]
    last: Ingested | None
    base: Ingested | None
    why: str

    @property
    def num_bytes(self) -> int:
        """Bytes to read."""
        return sum(file.stat().st_size for group in self.files.values() for file in group)


def plan_reading(source: Source, table: Path, made_from: Mapping[str, str]) -> Reading:
    """The new files alone where the source grew by files and nothing else changed, else all of them.

    Args:
        source: The raw files.
        table: The raw table.
        made_from: What the stage depends on, by part.
    """
    root = root_of(source)
    files = raw_files(source)
    marks = {split: file_marks(group, root=root) for split, group in files.items()}
    num = sum(map(len, marks.values()))
    last = read_record(table)
    if why := _why_all(last, made_from, marks, is_there=current_version(table) is not None):
        return Reading(files, marks, last, None, why=f"reads every file ({num:,}): {why}")
    assert last is not None
    new = {}
    for split, group in files.items():
        known = last.files.get(split, {})
        if came := [file for file in group if os.path.relpath(file, root) not in known]:
            new[split] = came
    why = f"reads the new files ({sum(map(len, new.values())):,} of {num:,}): nothing else changed"
    return Reading(new, marks, last, last, why=why)


def _why_all(
    last: Ingested | None, made_from: Mapping[str, str], marks: dict[str, dict[str, str]], *, is_there: bool
) -> str:
    """Why the rows that are there cannot stay, or nothing."""
    if last is None:
        return "no record of what the table holds" if is_there else "there is no version before"
    if parts := changed(last.made_from, without_files(made_from)):
        return ", ".join(parts[:3]) + (f" and {len(parts) - 3} more" if len(parts) > 3 else "") + " changed"
    for split, group in last.files.items():
        for name, mark in group.items():
            now = marks.get(split, {}).get(name)
            if now != mark:
                return f"{name} {'changed' if now else 'is gone'}"
    return ""


def without_files(made_from: Mapping[str, str]) -> dict[str, str]:
    """What a stage depends on beside the raw files."""
    return {part: digest for part, digest in made_from.items() if part != _RAW_FILES}


def read_record(table: Path) -> Ingested | None:
    """The record of the table's latest version; None where another tool made it, or none is there."""
    version = current_version(table)
    digest = commit_metadata(table, version).get(INGESTED_KEY) if version is not None else None
    try:
        return Ingested.model_validate_json(_record_path(table, digest).read_bytes()) if digest else None
    except (FileNotFoundError, ValidationError):
        return None


def keep_record(table: Path, record: Ingested) -> dict[str, Any]:
    """Write the record beside the table. Returns the metadata by which the commit of its rows names it."""
    digest = digest_of(record.model_dump(mode="json"))[:32]
    write_json(_record_path(table, digest), record)
    return {INGESTED_KEY: digest}


def drop_old_records(table: Path, metadata: Mapping[str, Any]) -> None:
    """Remove the records that the latest version does not name."""
    for path in _record_path(table, "").parent.glob("*.json"):
        if path.stem != metadata[INGESTED_KEY]:
            path.unlink()


def _record_path(table: Path, digest: str) -> Path:
    return table.with_name(f"{table.name}_record") / f"{digest}.json"
