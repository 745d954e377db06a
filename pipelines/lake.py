"""The lake's folders, and Snapshot: a Delta table pinned at a version, with its files, rows and digest.

A Snapshot is read from the Delta log and the Parquet footers without a JVM, and travels as JSON. Format:
https://github.com/delta-io/delta/blob/master/PROTOCOL.md
"""

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
from pydantic import BaseModel, ConfigDict

from pipelines.config.load import lake_root
from pipelines.errors import LakeError, one_line
from pipelines.receipt import digest_of

CONTRACT_KEY = "headrace.contract"
UINT64 = 1 << 64


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


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Column(_Frozen):
    """One column of a feature table.

    Attributes:
        kind: What it means. A sparse input is two columns, its ids and its weights.
        dtype: numpy's name of an element.
        shape: Shape of one row's value; `()` for a scalar.
        names: The source columns behind each place, where there are such.
        sizes: For ids, the number of distinct ids of each place; for sparse ids, of all.
        scale: For images, what 0 and 255 become in torch.
    """

    name: str
    kind: Literal["row_id", "label", "dense", "ids", "image", "sparse_ids", "sparse_weights"]
    dtype: Literal["uint8", "int64", "float32", "float64"]
    shape: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    scale: tuple[float, float] = (0.0, 1.0)

    @property
    def width(self) -> int:
        """Elements of one row's value."""
        width = 1
        for size in self.shape:
            width *= size
        return width

    @property
    def bytes_per_row(self) -> int:
        """Raw bytes of one row's value."""
        return self.width * {"uint8": 1, "float32": 4}.get(self.dtype, 8)


class LabelSpec(_Frozen):
    """What the label means.

    Attributes:
        classes: For class labels, the value behind each class index.
        mean: For a real label, its mean over the training split; the networks learn (label - mean) / std.
        std: Its standard deviation there, 1 where it is constant.
    """

    kind: Literal["binary", "multiclass", "real"]
    column: str
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    @property
    def num_outputs(self) -> int:
        """Outputs that a network needs: a logit a class, one for a binary label, one for a number."""
        return len(self.classes) if self.kind == "multiclass" else 1


class Contract(_Frozen):
    """The columns of a feature table and their meaning; travels in the commit's `userMetadata`."""

    columns: tuple[Column, ...]
    label: LabelSpec

    @property
    def inputs(self) -> tuple[Column, ...]:
        """The columns that a model takes, in the order of its arguments."""
        return tuple(column for column in self.columns if column.kind not in ("row_id", "label"))


class File(_Frozen):
    """A Parquet file of a table: path relative to the table, size, and rows and bytes of each row group."""

    path: str
    bytes: int
    row_groups: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> int:
        """Rows of all row groups."""
        return sum(rows for rows, _ in self.row_groups)


class Snapshot(_Frozen):
    """A Delta table pinned at a version.

    Attributes:
        table: The table's folder.
        files: Sorted by path.
        row_id_sum: Sum of the `row_id` column modulo 2^64; with `rows`, the row digest.
    """

    table: str
    version: int
    files: tuple[File, ...]
    contract: Contract | None
    rows: int
    row_id_sum: int

    @cached_property
    def digest(self) -> str:
        """Names the rows and the files that hold them."""
        return digest_of(self.model_dump(mode="json", exclude={"table"}))

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
            table: Folder of a Delta table with an int64 column `row_id`.
            version: The Delta version; None for the latest.
            row_id_sum: The sum of `row_id` modulo 2^64 where it is known from the write; else it is read.

        Raises:
            LakeError: There is no such table or version, its files are gone, or it uses a feature that would
                give other rows than its files hold (deletion vectors, column mapping, partition columns).
        """
        delta = _open_delta(Path(table), version)
        _refuse_features(Path(table), delta)
        files = _read_footers(Path(table), delta)
        return cls(
            table=str(Path(table).absolute()),
            version=delta.version(),
            files=tuple(files),
            contract=_read_contract(Path(table), delta.version()),
            rows=sum(file.rows for file in files),
            row_id_sum=_sum_row_ids(Path(table), files) if row_id_sum is None else row_id_sum % UINT64,
        )


def _open_delta(table: Path, version: int | None) -> DeltaTable:
    try:
        delta = DeltaTable(str(table))
    except TableNotFoundError:
        raise LakeError(f"{table}: wanted a Delta table, seen none; run the stage that writes it") from None
    except DeltaError as error:
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
            f"run REORG TABLE delta.`{table}` APPLY (PURGE)"
        )
    if properties.get("delta.columnMapping.mode", "none") != "none":
        raise LakeError(
            f"{where}: wanted columns under their own names, seen column mapping; write the table anew without it"
        )
    if metadata.partition_columns:
        raise LakeError(
            f"{where}: wanted an unpartitioned table, seen partition columns {metadata.partition_columns}, whose "
            "values are not in the files; write the table anew without partitionBy"
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
    log = table / "_delta_log" / f"{version:020}.json"
    if not log.is_file():  # removed by log clean-up, or written by another tool
        return None
    for line in log.read_text(encoding="utf-8").splitlines():
        info: Mapping[str, Any] = json.loads(line).get("commitInfo") or {}
        if CONTRACT_KEY in (info.get("userMetadata") or ""):
            return Contract.model_validate(json.loads(info["userMetadata"])[CONTRACT_KEY])
    return None


def _sum_row_ids(table: Path, files: list[File]) -> int:
    def of_file(file: File) -> int:
        try:
            column = pq.read_table(table / file.path, columns=["row_id"], partitioning=None).column("row_id")
        except (pa.ArrowInvalid, KeyError) as error:
            raise LakeError(f"{table / file.path}: wanted an int64 column row_id: {one_line(str(error))}") from None
        return sum(int(chunk.to_numpy().view("uint64").sum(dtype="uint64")) for chunk in column.chunks)

    with ThreadPoolExecutor(4) as pool:
        return sum(pool.map(of_file, files)) % UINT64
