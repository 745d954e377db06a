"""Small feature tables, written without Spark."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from deltalake import CommitProperties, write_deltalake

from pipelines.lake import CONTRACT_KEY, Column, Contract, LabelSpec, Recommended, Snapshot

ROW_ID = Column(name="row_id", kind="row_id", dtype="int64")
LABEL = Column(name="label", kind="label", dtype="int64")
DENSE = Column(name="dense", kind="dense", dtype="float32", shape=(4,))
IDS = Column(name="ids", kind="ids", dtype="int64", shape=(2,), sizes=(5, 3), names=("p", "q"))
IMAGE = Column(name="image", kind="image", dtype="uint8", shape=(4, 4), scale=(-1.0, 1.0))
SPARSE = (
    Column(name="words_ids", kind="sparse_ids", dtype="int64", shape=(3,), sizes=(7,)),
    Column(name="words_weights", kind="sparse_weights", dtype="float32", shape=(3,)),
)
SEQUENCE = Column(name="places", kind="sequence", dtype="int64", shape=(4,), sizes=(6,))
USER = Column(name="user", kind="ids", dtype="int64", shape=(1,), sizes=(7,), names=("u",))
ITEM = Column(name="item", kind="ids", dtype="int64", shape=(1,), sizes=(9,), names=("i",))
NEXT = LabelSpec(kind="next_token", column="text", classes=("", "?", "a", "b", "c", "d"))
BINARY = LabelSpec(kind="binary", column="y", classes=("0", "1"))


def rated(*others: Column) -> Contract:
    """A contract with users and items, the first of which are frequent."""
    label = LabelSpec(kind="real", column="rating", mean=3.0)
    recommended = Recommended(user="user", item="item", item_counts=(0, 40, 20, 10, 10, 8, 6, 5, 4))
    return contract_of(USER, ITEM, *others, label=label).model_copy(update={"recommended": recommended})


def contract_of(*inputs: Column, label: LabelSpec = BINARY) -> Contract:
    """A contract with the given inputs."""
    kind = LABEL if label.kind != "real" else Column(name="label", kind="label", dtype="float64")
    return Contract(columns=(ROW_ID, *inputs, *([kind] if label.has_column else [])), label=label)


def feature_table(path: Path, shard_rows: Sequence[int], contract: Contract, *, seed: int = 0) -> Snapshot:
    """A Delta table of one file a shard; the label is 1 where the first dense value (or id, pixel) is large."""
    generator = np.random.default_rng(seed)
    for rows in shard_rows:
        columns: dict[str, pa.Array] = {}
        first = None
        for column in contract.inputs:
            values, array = _values(column, rows, generator)
            columns[column.name] = array
            first = values.reshape(rows, -1)[:, 0] if first is None else first
        columns["row_id"] = pa.array(generator.integers(-(2**63), 2**63, rows, dtype=np.int64))
        label = first if contract.label.kind == "real" else (first > np.median(first)).astype(np.int64)
        columns["label"] = pa.array(np.asarray(label, dtype="float64" if contract.label.kind == "real" else "int64"))
        append_shard(path, columns, contract)
    return Snapshot.open(path)


def append_shard(path: Path, columns: Mapping[str, pa.Array], contract: Contract) -> None:
    """One more file of a Delta table with that contract."""
    metadata = json.dumps({CONTRACT_KEY: contract.model_dump(mode="json")})
    write_deltalake(
        str(path),
        pa.table({column.name: columns[column.name] for column in contract.columns}),
        mode="append",
        commit_properties=CommitProperties(custom_metadata={"userMetadata": metadata}),
    )


def _values(column: Column, rows: int, generator: np.random.Generator) -> tuple[np.ndarray, pa.Array]:
    if column.kind == "image":
        values = generator.integers(0, 256, (rows, column.width), dtype=np.uint8)
        return values, pa.array([row.tobytes() for row in values], pa.binary())
    if column.kind in ("ids", "sparse_ids", "sequence"):
        sizes = column.sizes if column.kind == "ids" else column.sizes * column.width
        values = np.stack([generator.integers(0, size, rows) for size in sizes], axis=1)
        return values, pa.array(list(values), pa.list_(pa.int64()))
    values = generator.normal(size=(rows, column.width)).astype(np.float32)
    return values, pa.array(list(values), pa.list_(pa.float32()))
