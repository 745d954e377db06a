"""Shards: what an epoch permutes, a row group of a file each."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.lake import Snapshot


@dataclass(frozen=True)
class Shard:
    """A row group of a file, and the rows that the Snapshot says it holds.

    Attributes:
        first_position: Where the table has no column `row_id`, the position of its first row.
    """

    path: Path
    rows: int
    row_group: int = 0
    first_position: int | None = None

    def __str__(self) -> str:
        return f"{self.path} row group {self.row_group}" if self.row_group else str(self.path)


def shards_of(snapshot: Snapshot) -> list[Shard]:
    """The Snapshot's shards, in its order: the row groups of its files that hold rows."""
    found, position = [], 0
    for path, file in zip(snapshot.paths(), snapshot.files, strict=True):
        for number, (rows, _) in enumerate(file.row_groups):
            if rows:
                found.append(Shard(path, rows, number, position if snapshot.row_ids == "position" else None))
            position += rows
    return found
