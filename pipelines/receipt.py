"""What a stage leaves behind: a JSON file that says what was made, and from what.

A receipt is written last and whole, so its presence means that the stage ended. Its digest covers
everything that the stage depends on; with the same digest and the outputs still there, the stage is
up to date.
"""

import ast
import contextlib
import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipelines.errors import LakeError

HASHED_BYTES = 64 << 20  # raw files up to this size count by their content, larger ones by size and time


class Receipt(BaseModel):
    """The record of a finished stage.

    Attributes:
        made_from: What the digest was computed from, by part; compared to say why a stage runs again.
        outputs: Files, folders and models that must still be there, with their bytes (-1: not a file).
        result: The noun that the stage made, as JSON.
    """

    model_config = ConfigDict(frozen=True)

    stage: str
    workload: str
    digest: str
    made_from: dict[str, str]
    seconds: float
    rows: int
    result: dict[str, Any]
    outputs: dict[str, int] = {}
    ended_at: str = ""
    run_id: str = ""

    @property
    def identity(self) -> str:
        """Changes when the stage ran on something else or made something else."""
        return digest_of({"digest": self.digest, "result": self.result})


def digest_of(value: Any) -> str:
    """The sha256 of a JSON value, in hexadecimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def read_receipt(path: Path) -> Receipt | None:
    """The receipt at `path`, or None where there is none.

    Raises:
        LakeError: The file is not a receipt.
    """
    try:
        return Receipt.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise LakeError(f"{path}: wanted a receipt, seen something else: {str(error).splitlines()[0]}") from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = value.model_dump_json(indent=1) if isinstance(value, BaseModel) else json.dumps(value, indent=1)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


def file_marks(files: Iterable[Path], *, root: Path) -> dict[str, str]:
    """By relative path what names a raw file's content: size and hash, or modification time above a size limit."""
    marks = {}
    for file in sorted(files):
        stat = file.stat()
        mark = content_hash(file) if stat.st_size <= HASHED_BYTES else f"mtime {stat.st_mtime_ns}"
        marks[os.path.relpath(file, root)] = f"{stat.st_size} {mark}"
    return marks


def files_digest(files: Iterable[Path], *, root: Path) -> str:
    """A digest of raw files, by their marks."""
    return digest_of(file_marks(files, root=root))


def modules_digest(modules: Iterable[str]) -> dict[str, str]:
    """The source hash of each module and of all that it imports from its own top-level package."""
    found: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        source = _source_of(name)
        if source is None:
            continue
        found[name] = hashlib.sha256(source).hexdigest()
        waiting += [other for other in _imports(name, source) if other not in found]
    return dict(sorted(found.items()))


def content_hash(file: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _source_of(module: str) -> bytes | None:
    path = _path_of(module)
    return path.read_bytes() if path else None


def _path_of(module: str) -> Path | None:
    """The source file of a module, found without importing it or its parent packages."""
    top, *rest = module.split(".")
    package = _package_folder(top)
    if package is None:
        return None
    base = package.joinpath(*rest)
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


@cache
def _package_folder(top: str) -> Path | None:
    spec = importlib.util.find_spec(top)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


@cache
def _imports(module: str, source: bytes) -> frozenset[str]:
    """Modules that `source` names in import statements, anywhere in it, within the same top-level package."""
    package = module.partition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(name for name in names if name.partition(".")[0] == package and _path_of(name))


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The parts of `made_from` that differ."""
    return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
