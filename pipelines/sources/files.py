"""Which raw files a source names, and what their paths are relative to."""

import glob
import os
import re
from pathlib import Path

from pipelines.config.data import Table
from pipelines.errors import DataError

_GLOB = re.compile(r"[*?\[]")


def raw_files(source: Table) -> dict[str, list[Path]]:
    """The files of each split, sorted; one entry named '' where the paths name no splits.

    A Delta table's are the Parquet files of the version that `options.version` pins, or of the latest.

    Raises:
        DataError: A path names no file.
    """
    paths = source.paths if isinstance(source.paths, dict) else {"": source.paths}
    version = source.options.get("version")
    pin = None if version is None else int(version)
    return {split: named_files(patterns, source.format, version=pin) for split, patterns in paths.items()}


def named_files(patterns: list[str], what: str, *, version: int | None = None, key: str = "source.paths") -> list[Path]:
    """The files that paths, folders or globs name, sorted; of a Delta table those of a version.

    `what` is their format, `key` where the config names them.

    Raises:
        DataError: A path names no file.
        LakeError: A Delta table cannot be pinned (see `Snapshot.open`).
    """
    named = _resolve(patterns, what, key)
    if what != "delta":
        return named
    from pipelines.lake import Snapshot

    return [file for table in named for file in Snapshot.open(table, version=version, row_id_sum=0).paths()]


def root_of(source: Table) -> Path:
    """The folder that relative paths, and so keys, start from.

    It follows from the config alone: a new file under a glob does not move it.
    """
    return Path(os.path.commonpath([_fixed_folder(pattern) for pattern in _patterns(source)]))


def all_there(source: Table) -> bool:
    """Whether each path names a file."""
    return all(glob.glob(pattern, recursive=True) for pattern in _patterns(source))


def _patterns(source: Table) -> list[str]:
    return source.paths if isinstance(source.paths, list) else [p for group in source.paths.values() for p in group]


def _resolve(patterns: list[str], what: str, key: str) -> list[Path]:
    found: list[Path] = []
    for pattern in patterns:
        path = _absolute(pattern)
        if path.is_dir() and what != "delta":
            matches = [p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith((".", "_"))]
        elif path.exists():
            matches = [path]
        else:
            matches = [_absolute(p) for p in sorted(glob.glob(pattern, recursive=True)) if Path(p).is_file()]
        if not matches:
            raise DataError(
                f"{key}: wanted {what} files at {path}, seen none; check the path, or set HEADRACE_DATA to the "
                "folder of the data sets"
            )
        found += matches
    return sorted(set(found))


def _absolute(path: str) -> Path:
    """As Hadoop writes it: without `..`, whose place in a file's URI would else move where a relative path begins."""
    return Path(os.path.normpath(Path(path).absolute()))


def _fixed_folder(pattern: str) -> str:
    """The longest folder of a pattern that no glob character touches."""
    path = _absolute(pattern)
    parts = path.parts
    fixed = [i for i, part in enumerate(parts) if _GLOB.search(part)]
    if fixed:
        return str(Path(*parts[: fixed[0]]))
    return str(path if path.is_dir() else path.parent)
