"""Receipts are whole or absent, and their digests follow what a stage depends on and nothing else."""

import json
import os
from pathlib import Path

import pytest

from pipelines.errors import LakeError
from pipelines.receipt import Receipt, changed, files_digest, modules_digest, read_receipt, write_json

RECEIPT = Receipt(
    stage="ingest", workload="w", digest="d", made_from={"config source": "1"}, seconds=1.5, rows=3, result={"a": 1}
)


def test_a_receipt_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "ingest.json"
    assert read_receipt(path) is None
    write_json(path, RECEIPT)
    assert read_receipt(path) == RECEIPT
    assert {"stage", "workload", "digest", "seconds", "rows", "result"} <= json.loads(path.read_text()).keys()
    assert os.listdir(path.parent) == ["ingest.json"], "no temporary file is left"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "ingest.json"
    write_json(path, RECEIPT)
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_receipt(path) == RECEIPT and os.listdir(tmp_path) == ["ingest.json"]


def test_a_file_that_is_no_receipt_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ingest.json"
    path.write_text('{"stage": 1')
    with pytest.raises(LakeError, match=r"ingest\.json: wanted a receipt"):
        read_receipt(path)


def test_identity_follows_digest_and_result() -> None:
    assert RECEIPT.identity == RECEIPT.model_copy(update={"seconds": 9.0, "run_id": "x"}).identity
    assert RECEIPT.identity != RECEIPT.model_copy(update={"result": {"a": 2}}).identity
    assert RECEIPT.identity != RECEIPT.model_copy(update={"digest": "e"}).identity


def test_files_count_by_relative_path_size_and_content(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.csv").write_text("1\n2\n")

    def digest(folder: str) -> str:
        root = tmp_path / folder
        return files_digest(root.iterdir(), root=root)

    before = digest("one")
    assert before == digest("two"), "neither the place nor the time counts"
    (tmp_path / "two" / "a.csv").write_text("1\n3\n")
    assert digest("two") != before
    (tmp_path / "one" / "b.csv").write_text("")
    assert digest("one") != before


def test_modules_of_a_stage() -> None:
    ingest = modules_digest(["pipelines.ingest", "pipelines.sources.csv"])
    assert {"pipelines.ingest", "pipelines.tables", "pipelines.sources.csv", "pipelines.sources.lines"} <= ingest.keys()
    for other in ("pipelines.sources.idx", "pipelines.classic", "pipelines.evaluate", "pipelines.train.loop"):
        assert other not in ingest
    train = modules_digest(["pipelines.train.launch", "pipelines.train.worker", "pipelines.models.mlp"])
    assert {"pipelines.train.worker", "pipelines.stream.reader", "pipelines.models.inputs"} <= train.keys()
    assert "pipelines.models.cnn" not in train and "pipelines.classic" not in train


def test_what_changed_is_named() -> None:
    assert changed({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "x", "d": "4"}) == ["b", "c", "d"]
