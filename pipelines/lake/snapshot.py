"""Snapshot: a Delta table pinned at a version, with its files, rows and digest.

A Snapshot is read from the Delta log and the Parquet footers without a JVM, and travels as JSON. Format:
https://github.com/delta-io/delta/blob/master/PROTOCOL.md
"""

import contextlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from pipelines.errors import LakeError, one_line
from pipelines.lake.contract import CONTRACT_KEY, Contract, Frozen
from pipelines.lake.row_ids import ROW_ID, UINT64, sum_position_ids, sum_row_ids
from pipelines.receipt import digest_of


class File(Frozen):
    """A Parquet file of a table: path relative to the table, size, and rows and bytes of each row group."""

    path: str
    bytes: int
    row_groups: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> int:
        """Rows of all row groups."""
        return sum(rows for rows, _ in self.row_groups)


class Snapshot(Frozen):
    """A Delta table pinned at a version.

    Attributes:
        table: The table's folder.
        files: Sorted by path.
        contract: What the features stage says of the columns; None for a table that another tool wrote.
        row_ids: Where a row's `row_id` comes from: the column of that name, or the row's position in the table.
        row_id_sum: Sum of `row_id` modulo 2^64; with `rows`, the row digest.
    """

    table: str
    version: int
    files: tuple[File, ...]
    contract: Contract | None
    rows: int
    row_id_sum: int
    row_ids: Literal["column", "position"] = "column"

    @cached_property
    def digest(self) -> str:
        """Names the rows and the files that hold them."""
        values = self.model_dump(mode="json", exclude={"table"})
        if self.row_ids == "column":  # what digests of old say
            del values["row_ids"]
        return digest_of(values)

    @property
    def row_digest(self) -> str:
        """Names the rows, wherever they lie."""
        return f"{self.rows}:{self.row_id_sum:016x}"

    def paths(self) -> list[Path]:
        """The absolute path of each file."""
        return [Path(self.table) / file.path for file in self.files]

    def missing(self) -> list[Path]:
        """Files that are gone or have another size."""
        gone = []
        for file, path in zip(self.files, self.paths(), strict=True):
            if not path.is_file() or path.stat().st_size != file.bytes:
                gone.append(path)
        return gone

    @classmethod
    def open(cls, table: str | Path, *, version: int | None = None, row_id_sum: int | None = None) -> "Snapshot":
        """Pin `table` at `version`, the latest by default.

        Args:
            table: Folder of a Delta table. Without an int64 column `row_id`, rows are known by their position.
            version: The Delta version; None for the latest.
            row_id_sum: The sum of `row_id` modulo 2^64 where it is known from the write; else it is read.

        Raises:
            LakeError: There is no such table or version, its files are gone, or it uses a feature that would
                give other rows than its files hold (deletion vectors, column mapping, partition columns).
        """
        path = Path(table)
        delta = _open_delta(path, version)
        _refuse_features(path, delta)
        files = _read_footers(path, delta)
        rows = sum(file.rows for file in files)
        row_ids: Literal["column", "position"] = "column" if ROW_ID in _int64_columns(delta) else "position"
        if row_ids == "position":
            row_id_sum = sum_position_ids(rows)
        elif row_id_sum is None:
            row_id_sum = sum_row_ids([path / file.path for file in files])
        return cls(
            table=str(path.absolute()),
            version=delta.version(),
            files=tuple(files),
            contract=_read_contract(path, delta.version()),
            rows=rows,
            row_id_sum=row_id_sum % UINT64,
            row_ids=row_ids,
        )


def rewrite_command(table: str | Path) -> str:
    """The command that writes a table anew in the layout that streams."""
    return f'make layout ARGS="{table} {table}_layout"'


def _open_delta(table: Path, version: int | None) -> DeltaTable:
    try:
        delta = DeltaTable(str(table))
    except TableNotFoundError:
        raise LakeError(f"{table}: wanted a Delta table, seen none; run the stage that writes it") from None
    except DeltaError as error:
        if "'udt'" in str(error):
            raise LakeError(
                f"{table}: wanted plain columns, seen a user-defined type such as MLlib's vectors; rewrite it: "
                f"{rewrite_command(table)}"
            ) from None
        raise LakeError(f"{table}: the Delta log cannot be read: {one_line(str(error))}") from None
    if version is None or version == delta.version():
        return delta
    try:
        if not 0 <= version < delta.version():
            raise DeltaError(f"the latest is {delta.version()}")
        delta.load_as_version(version)
    except DeltaError as error:
        raise LakeError(
            f"{table}: wanted version {version}, which is not there (latest: {DeltaTable(str(table)).version()}): "
            f"{one_line(str(error), limit=120)}"
        ) from None
    return delta


def _refuse_features(table: Path, delta: DeltaTable) -> None:
    where = f"{table} version {delta.version()}"
    metadata = delta.metadata()
    properties = metadata.configuration
    reader_features = set(delta.protocol().reader_features or [])
    if "deletionVectors" in reader_features and pa.table(delta.deletion_vectors()).num_rows:
        raise LakeError(
            f"{where}: wanted plain files, seen deletion vectors, whose deleted rows would come back; "
            f"rewrite it: {rewrite_command(table)}"
        )
    if properties.get("delta.columnMapping.mode", "none") != "none":
        raise LakeError(
            f"{where}: wanted columns under their own names, seen column mapping; rewrite it: {rewrite_command(table)}"
        )
    if metadata.partition_columns:
        raise LakeError(
            f"{where}: wanted an unpartitioned table, seen partition columns {metadata.partition_columns}, whose "
            f"values are not in the files; rewrite it: {rewrite_command(table)}"
        )


def _read_footers(table: Path, delta: DeltaTable) -> list[File]:
    actions = pa.table(delta.get_add_actions(flatten=True))
    paths = [unquote(path) for path in actions.column("path").to_pylist()]
    sizes = actions.column("size_bytes").to_pylist()
    gone = [path for path in paths if not (table / path).is_file()]
    if gone:
        raise LakeError(
            f"{table} version {delta.version()}: wanted {len(paths)} files, {len(gone)} are gone (VACUUM?), such as "
            f"{gone[0]}; pin a later version or restore the files"
        )

    def footer(path: str, size: int) -> File:
        if (table / path).stat().st_size != size:
            raise LakeError(f"{table / path}: wanted {size} bytes, seen {(table / path).stat().st_size}; restore it")
        try:
            metadata = pq.read_metadata(table / path)
        except (pa.ArrowInvalid, OSError) as error:
            raise LakeError(f"{table / path}: not a Parquet file: {one_line(str(error), limit=120)}") from None
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        return File(path=path, bytes=size, row_groups=tuple((g.num_rows, g.total_byte_size) for g in groups))

    with ThreadPoolExecutor(8) as pool:
        return sorted(pool.map(footer, paths, sizes), key=lambda file: file.path)


def _read_contract(table: Path, version: int) -> Contract | None:
    """The contract in the commit that wrote the version, if it left one."""
    contract = commit_metadata(table, version).get(CONTRACT_KEY)
    return Contract.model_validate(contract) if contract else None


def commit_metadata(table: Path, version: int) -> dict[str, Any]:
    """The JSON in the `userMetadata` of the commit that made the version; empty where there is none."""
    log = table / "_delta_log" / f"{version:020}.json"
    if not log.is_file():  # removed by log clean-up, or written by another tool
        return {}
    for line in log.read_text(encoding="utf-8").splitlines():
        info: Mapping[str, Any] = json.loads(line).get("commitInfo") or {}
        with contextlib.suppress(ValueError):  # another tool's
            metadata = json.loads(info.get("userMetadata") or "{}")
            if isinstance(metadata, dict) and metadata:
                return metadata
    return {}


def _int64_columns(delta: DeltaTable) -> set[str]:
    return {field.name for field in pa.schema(delta.schema().to_arrow()) if field.type == pa.int64()}
