"""What a schema has otherwise than another is named, and of two files that disagree both are."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from pipelines.config.data import Source
from pipelines.errors import DataError
from pipelines.ingest import parse
from pipelines.sources.parquet import undeclared
from pipelines.sources.schema import differences

WANTED = {"a": "int", "b": "double", "c": "string"}


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (WANTED, []),
        ({**WANTED, "d": "int"}, ["'d' added"]),
        ({"a": "int", "c": "string"}, ["'b' dropped"]),
        ({"a": "int", "bb": "double", "c": "string"}, ["'b' renamed to 'bb'"]),
        ({"a": "int", "bb": "int", "c": "string"}, ["'b' dropped", "'bb' added"]),
        ({"a": "bigint", "b": "double", "c": "string"}, ["'a' int became bigint"]),
        ({"b": "double", "a": "int", "c": "string"}, ["reordered to b, a, c"]),
    ],
)
def test_differences_in_words(seen: dict[str, str], said: list[str]) -> None:
    assert differences(WANTED, seen) == said


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("a,bb,c", "'b' renamed to 'bb'"),
        ("a,c", "'b' dropped"),
        ("a,b,c,d,e,f,g", "'d' added, 'e' added, 'f' added, 'g' added"),
        ("b,a,c", "reordered to b, a, c"),
        ("a,b,c,c", "a column twice"),
    ],
)
def test_two_files_with_different_headers(spark: SparkSession, tmp_path: Path, header: str, said: str) -> None:
    (tmp_path / "jan.csv").write_text("a,b,c\n1,2,x\n")
    (tmp_path / "feb.csv").write_text(f"{header}\n1,2,x\n")
    source = Source.model_validate(
        {"format": "csv", "paths": str(tmp_path), "schema": WANTED, "options": {"header": True}}
    )
    wanted = f"feb.csv: header: wanted a, b, c as jan.csv has them, seen {header.replace(',', ', ')}: {said}; mend"
    with pytest.raises(DataError) as caught:
        parse(spark, source)
    assert str(caught.value).startswith(wanted)


def test_two_parquet_files_with_different_schemas(spark: SparkSession, tmp_path: Path) -> None:
    def write(name: str, **columns: list[object]) -> Path:
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
        return tmp_path / f"{name}.parquet"

    source = Source.model_validate({"format": "parquet", "paths": str(tmp_path), "schema": "n bigint, x double"})
    files = [write("jan", n=[1], x=[0.5]), write("mar", x=[0.5], more=[""], n=[2])]
    assert sorted(row["n"] for row in parse(spark, source).collect()) == [1, 2], "read by name, in any order"
    assert undeclared(files, source.columns) == [
        "left out: column 'more' of 1 of 2 files, as mar.parquet; source.schema does not name it"
    ]
    write("feb", n=[1], xx=[0.5])
    said = (
        r"feb\.parquet: wanted a column 'x', seen n, xx: 'x' renamed to 'xx'; jan\.parquet has what is declared; mend"
    )
    with pytest.raises(DataError, match=said):
        parse(spark, source)
    write("feb", n=["1"], x=[0.5])
    with pytest.raises(DataError, match=r"feb\.parquet: column 'n': wanted bigint, seen string; jan\.parquet has"):
        parse(spark, source)


def test_a_changed_row_width_without_a_header_is_rejected(spark: SparkSession, workload: Callable[..., Path]) -> None:
    folder = workload("1,2,red,0\n").parent / "raw"
    (folder / "wide.csv").write_text("1,2,red,0,more\n")
    source = Source.model_validate({"format": "csv", "paths": str(folder), "schema": "a int, b int, c string, y int"})
    reasons = {row["_file"]: row["_reason"] for row in parse(spark, source).collect()}
    assert reasons == {"rows.csv": None, "wide.csv": "wanted 4 fields, seen another number"}
