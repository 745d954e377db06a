"""Blocks of characters: each is there, in its order, once and where blocks meet twice, wherever files are cut."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from pipelines.config import load_config
from pipelines.errors import ConfigError
from pipelines.ingest import parse
from pipelines.sources import blocks
from tests.stages import run

Workload = Callable[..., Path]
TEXT = st.text(st.sampled_from("ab\n\r\u0000é€日𝄞\ufeff"), max_size=40)
LABELLED = {
    "features": {
        "label": {"column": "text", "kind": "next_token"},
        "inputs": {"ids": {"columns": ["text"], "steps": ["tokens", "vocabulary", {"sequence": {"length": 5}}]}},
    },
    "classic": [],
    "model": {"network": "gpt"},
}


def source(folder: Path, chars: object) -> dict[str, object]:
    return {"format": "text", "paths": str(folder), "schema": "text string", "options": {"block_chars": chars}}


def cut_here(files: list[Path], root: Path, *, chars: int) -> list[tuple[str, int, bytes]]:
    """What the workers make of the files, without Spark."""
    named = ("path", "_file", "start", "size")
    rows = [dict(zip(named, part, strict=True)) for part in blocks._ranges(files, root)]
    counts = [b for row in rows for b in blocks._counted(iter([pa.RecordBatch.from_pylist([row])]))]
    placed = blocks._placed([tuple(row.values()) for batch in counts for row in batch.to_pylist()])
    found = []
    for part in placed:
        row = pa.RecordBatch.from_pylist([dict(zip((*named, "first"), part, strict=True))])
        for batch in blocks._cut(iter([row]), chars=chars):
            found += [(row["_file"], row["_line"], row["bytes"]) for row in batch.to_pylist()]
    return found


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXT, min_size=1, max_size=3), chars=st.integers(1, 7), range_bytes=st.integers(1, 50))
def test_each_character_is_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], chars: int, range_bytes: int
) -> None:
    monkeypatch.setattr(blocks, "RANGE_BYTES", range_bytes)
    files = [tmp_path / f"{number}.txt" for number in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_bytes(text.encode())
    found = cut_here(files, tmp_path, chars=chars)
    for file, text in zip(files, texts, strict=True):
        mine = [(line, data.decode()) for name, line, data in found if name == file.name]
        assert [line for line, _ in mine] == list(range(1, len(mine) + 1))
        assert mine[0][1][:1] + "".join(block[1:] for _, block in mine) == text if mine else not text
        assert all(len(block) == chars + 1 for _, block in mine[:-1])
        assert len(mine) == max(-(-(len(text) - 1) // chars), min(len(text), 1))
        assert all(before[-1] == after[0] for (_, before), (_, after) in pairwise(mine))


def test_ingested_and_rejected(
    spark: SparkSession, lake: Path, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Spark, over ranges that end inside characters."""
    monkeypatch.setattr(blocks, "RANGE_BYTES", 5)
    raw = lake.parent / "raw"
    path = workload("", source=source(raw, 4) | {"max_rejected": 0.5}, **LABELLED)
    (raw / "rows.csv").unlink()
    (raw / "b.txt").write_text("To be,\nor not to bé: €")
    (raw / "a.txt").write_text("x")
    (raw / "c.txt").write_bytes(b"good \xff\x80 bad")
    (raw / "empty.txt").write_text("")
    rows = parse(spark, load_config(path).source).orderBy("_file", "_line").collect()
    assert [(row["_file"], row["_line"], row["_reason"]) for row in rows if row["_reason"]] == [
        ("a.txt", 1, "text: wanted two characters or more, seen one"),
        ("c.txt", 2, "text: wanted UTF-8, seen other bytes"),
    ]
    text = [row["text"] for row in rows if row["_file"] == "b.txt"]
    assert text == ["To be", "e,\nor", "r not", "t to ", " bé: ", " €"]
    assert len({row["row_id"] for row in rows}) == len(rows)
    receipt = run(path, "ingest")["ingest"]
    assert [receipt.result[f"rows_{part}"] for part in ("read", "accepted", "rejected")] == [
        len(rows),
        len(rows) - 2,
        2,
    ]


@pytest.mark.parametrize("chars", [0, -1, 1.5, "many", True])
def test_a_block_is_of_some_characters(workload: Workload, tmp_path: Path, chars: object) -> None:
    with pytest.raises(ConfigError, match="block_chars: wanted a number of characters, at least 1, seen"):
        load_config(workload("", source=source(tmp_path, chars), **LABELLED))
