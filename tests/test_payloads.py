"""Files that travel are data: none of these payloads runs, wherever it is put."""

import io
import json
import marshal
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.errors import HeadraceError
from pipelines.lake import Snapshot
from pipelines.receipt import read_receipt
from pipelines.stream import LaneLoader
from pipelines.train.elastic.wire import Message
from tests.tables import DENSE, contract_of, feature_table
from tests.train.test_checkpoint import Run


class Call:
    """Unpickled, it calls."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._made_of = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._made_of


def touch(canary: Path) -> Call:
    return Call(exec, f"open({str(canary)!r}, 'w').close()")


def saved(call: Call, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save({"weight": call}, file, **options)
    return file.getvalue()


def numpy_file(call: Call, *, archive: bool) -> bytes:
    file = io.BytesIO()
    values = np.array([call], dtype=object)
    if archive:
        np.savez(file, values)
    else:
        np.save(file, values)
    return file.getvalue()


def parquet_metadata(call: Call, key: bytes) -> bytes:
    """As Petastorm keeps its schema: pickled, in the metadata of a schema."""
    file = io.BytesIO()
    schema = pa.schema([pa.field("x", pa.int64())], metadata={key: pickle.dumps(call, protocol=2)})
    pq.write_metadata(schema, file)
    return file.getvalue()


def safetensors_file(header: object, *, size: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text


PAYLOADS: dict[str, Callable[[Path], bytes]] = {
    **{f"pickle {p}": lambda c, p=p: pickle.dumps(touch(c), protocol=p) for p in range(6)},  # type: ignore[misc]
    "pickle by hand": lambda c: b"cposix\nsystem\n(S'touch " + str(c).encode() + b"'\ntR.",
    "torch.save": lambda c: saved(touch(c)),
    "torch.save, old format": lambda c: saved(touch(c), _use_new_zipfile_serialization=False),
    "npy": lambda c: numpy_file(touch(c), archive=False),
    "npz": lambda c: numpy_file(touch(c), archive=True),
    "marshal": lambda c: marshal.dumps(compile(f"open({str(c)!r}, 'w')", "payload", "exec")),
    "python": lambda c: f"open({str(c)!r}, 'w').close()".encode(),
    "shell": lambda c: f"#!/bin/sh\ntouch {c}\n".encode(),
    "yaml": lambda c: f"!!python/object/apply:os.system ['touch {c}']".encode(),
    "jsonpickle": lambda c: json.dumps({"py/reduce": [{"py/function": "os.system"}, [f"touch {c}"]]}).encode(),
    "petastorm schema": lambda c: parquet_metadata(touch(c), b"dataset-toolkit.unischema.v1"),
    "petastorm row groups": lambda c: parquet_metadata(touch(c), b"dataset-toolkit.num_row_groups_per_file.v1"),
    "safetensors, header of 2^62": lambda c: safetensors_file({}, size=2**62),
    "safetensors, offsets outside": lambda c: safetensors_file(
        {"weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    ),
    "safetensors, pickle as metadata": lambda c: safetensors_file(
        {"__metadata__": {"pickle": pickle.dumps(touch(c), protocol=0).decode()}}
    ),
    "json that nests": lambda c: b"[" * 100_000,
}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def test_the_payloads_are_live(canary: Path) -> None:
    assert len(PAYLOADS) >= 20
    pickle.loads(PAYLOADS["pickle 4"](canary))
    assert canary.exists()
    canary.unlink()
    torch.load(io.BytesIO(PAYLOADS["torch.save"](canary)), weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize("name", PAYLOADS)
def test_beside_the_files_of_a_table(name: str, canary: Path, tmp_path: Path) -> None:
    snapshot = feature_table(tmp_path / "t", [30, 20], contract_of(DENSE))
    for file in ("_common_metadata", "_metadata", "_delta_log/_last_checkpoint"):
        (tmp_path / "t" / file).write_bytes(PAYLOADS[name](canary))
    with LaneLoader(snapshot, 10, lanes=2, epochs=1) as loader:
        assert sum(batch.rows for batch in loader) == 50
    try:
        Snapshot.open(tmp_path / "t")
    except HeadraceError as error:
        assert str(tmp_path / "t") in str(error)
    assert not canary.exists()


@pytest.mark.parametrize("file", ["rank-0.safetensors", "state.json"])
def test_in_a_checkpoint(file: str, canary: Path, tmp_path: Path) -> None:
    whole = Run(optimizer="Adam")
    whole.steps(1)
    path = whole.save(tmp_path / "checkpoints")
    for name, payload in PAYLOADS.items():
        harmed = Path(shutil.copytree(path, tmp_path / "harmed"))
        (harmed / file).write_bytes(payload(canary))
        with pytest.raises(HeadraceError, match="wanted a checkpoint"):
            Run(optimizer="Adam").load(harmed)
        assert not canary.exists(), name
        shutil.rmtree(harmed)


def test_as_a_message_between_ranks(canary: Path) -> None:
    for name, payload in PAYLOADS.items():
        with pytest.raises(ValueError, match="wanted safetensors with a header"):
            Message.of(payload(canary))
        assert not canary.exists(), name


def test_as_a_receipt(canary: Path, tmp_path: Path) -> None:
    for name, payload in PAYLOADS.items():
        (tmp_path / "train.json").write_bytes(payload(canary))
        with pytest.raises(HeadraceError, match=r"train\.json: wanted a receipt"):
            read_receipt(tmp_path / "train.json")
        assert not canary.exists(), name
