"""Text sources: every line ends as a row or as a reject with its place and reason, wherever blocks are cut."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
from pyspark.sql import Row, SparkSession

from pipelines.config import load_config
from pipelines.config.data import Source
from pipelines.errors import DataError
from pipelines.ingest import parse
from pipelines.sources.files import raw_files, root_of

Workload = Callable[..., Path]


def parsed(spark: SparkSession, path: Path) -> list[Row]:
    return parse(spark, load_config(path).source).orderBy("_file", "_line").collect()


def test_csv_rows_and_reasons(spark: SparkSession, workload: Workload) -> None:
    text = (
        "1,2,red,0\n\n1,2,red\n1,2,red,0,9\nx,2,red,1\n1,2,red,0.5\nNaN,2,red,1\n1,-inf,red,1\n1e999,2,red,1\n, ,,1\n"
    )
    rows = parsed(spark, workload(text))
    assert [row["_line"] for row in rows] == [1, 3, 4, 5, 6, 7, 8, 9, 10], "a blank line counts, and is no row"
    assert [row["_reason"] for row in rows] == [
        None,
        "wanted 4 fields, seen another number",
        "wanted 4 fields, seen another number",
        "a: wanted double, seen 'x'",
        "y: wanted int, seen '0.5'",
        "a: wanted a finite number, seen NaN",
        "b: wanted double, seen '-inf'",
        "a: wanted a finite number, seen Infinity",
        "b: wanted double, seen ' '",
    ]
    assert rows[0]["a"] == 1.0 and rows[0]["color"] == "red" and rows[1]["_raw"] == "1,2,red"


def test_csv_options(spark: SparkSession, workload: Workload) -> None:
    source = {
        "format": "csv",
        "paths": "",
        "schema": "name string, day date, n bigint, flag boolean",
        "options": {"sep": ";", "quote": "'", "nullValue": "-", "header": True, "ignoreLeadingWhiteSpace": True},
    }
    path = workload("name; day; n; flag\n'a;b'; 2024-02-29; 9000000000; true\n-;-;-;-\n")
    source["paths"] = str(path.parent / "raw" / "*.csv")
    features = {
        "label": {"column": "n", "kind": "real"},
        "inputs": {"ids": {"columns": ["name"], "steps": ["vocabulary"]}},
    }
    classic = [{"estimator": "LinearRegression"}]
    rows = parsed(spark, workload(source=source, features=features, classic=classic))
    assert [row["_reason"] for row in rows] == [None, None]
    assert (rows[0]["name"], str(rows[0]["day"]), rows[0]["n"], rows[0]["flag"]) == (
        "a;b",
        "2024-02-29",
        9 * 10**9,
        True,
    )
    assert rows[1]["name"] is rows[1]["day"] is None


def test_a_header_must_be_the_declared_one(spark: SparkSession, workload: Workload) -> None:
    source = {"format": "csv", "options": {"header": True}, "schema": "a double, b double, color string, y int"}
    path = workload("a,c,color,y\n1,2,red,0\n")
    with pytest.raises(DataError, match=r"rows\.csv: header: wanted a, b, color, y, seen a, c, color, y"):
        parsed(spark, workload(source={**source, "paths": str(path.parent / "raw")}))


def test_lines_are_numbered_alike_however_files_are_cut(
    spark: SparkSession, workload: Workload, tmp_path: Path
) -> None:
    path = workload("".join(f"{i},0,red,0\n" for i in range(3000)))
    (tmp_path / "raw" / "more.csv").write_text("\n".join(f"{i},1,red,0" for i in range(50)))
    (tmp_path / "raw" / "zipped.csv.gz").write_bytes(gzip.compress(b"7,2,red,0\n8,2,red,0\n"))
    settings = {"spark.sql.files.maxPartitionBytes": "7000", "spark.sql.files.openCostInBytes": "100"}
    config = load_config(path, [f"source.paths={tmp_path}/raw"])

    def keys() -> list[tuple[str, int, float, int]]:
        rows = parse(spark, config.source).collect()
        return sorted((row["_file"], row["_line"], row["a"], row["row_id"]) for row in rows)

    whole = keys()
    assert len(whole) == 3052 and [k[:3] for k in whole[-2:]] == [("zipped.csv.gz", 1, 7.0), ("zipped.csv.gz", 2, 8.0)]
    assert all(line == a + 1 for file, line, a, _ in whole if file != "zipped.csv.gz")
    before = {key: spark.conf.get(key) for key in settings}
    for key, value in settings.items():
        spark.conf.set(key, value)
    try:
        assert keys() == whole
    finally:
        for key, value in before.items():
            spark.conf.set(key, str(value))


def test_keys_do_not_depend_on_where_the_files_lie(spark: SparkSession, workload: Workload, tmp_path: Path) -> None:
    path = workload("1,2,red,0\n3,4,blue,1\n")
    other = tmp_path / "else where+1%"
    (tmp_path / "raw").rename(other)
    moved = load_config(path, [f"source.paths={other}"])
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "rows.csv").write_text("1,2,red,0\n3,4,blue,1\n")
    winding = load_config(path, [f"source.paths={tmp_path}/raw/../raw/./rows.csv"])
    rows = [parse(spark, config.source).collect() for config in (load_config(path), moved, winding)]
    assert {row["_file"] for row in rows[0] + rows[2]} == {"rows.csv"}
    ids = [sorted(row["row_id"] for row in found) for found in rows]
    assert ids[0] == ids[1] == ids[2] and len(set(ids[0])) == 2


def test_a_key_of_the_data(spark: SparkSession, workload: Workload) -> None:
    path = workload("1,2,red,0\n3,4,blue,1\n5,6,,1\n")
    config = load_config(path, ["source.key=[color]"])
    rows = parse(spark, config.source).orderBy("_line").collect()
    assert rows[2]["_reason"] == "color: wanted a key, seen null"
    (expected,) = spark.sql("SELECT xxhash64('red')").first() or (None,)
    assert rows[0]["row_id"] == expected


def test_lines_of_text(spark: SparkSession, workload: Workload, tmp_path: Path) -> None:
    lines = 'one, "two\n\n   \n  \t indented\r\nΣ\0日本'.encode() + b"\nno \xff text\n\xef\xbb\xbfmark\nlast"
    (tmp_path / "x.txt").write_bytes(lines)
    source = {"format": "text", "paths": str(tmp_path / "x.txt"), "schema": "line string"}
    features = {"inputs": {"x": {"columns": ["line"], "steps": ["tokens", "vocabulary", {"bag": {"length": 9}}]}}}
    rows = parsed(spark, workload(source=source, features=features, classic=[{"estimator": "LDA"}]))
    assert [(row["_line"], row["line"]) for row in rows] == [
        (1, 'one, "two'),
        (4, "  \t indented"),
        (5, "Σ\0日本"),
        (6, "no \ufffd text"),
        (7, "\ufeffmark"),
        (8, "last"),
    ], "blank lines count, and are no rows"
    assert [row["_reason"] for row in rows] == [*[None] * 3, "line: wanted UTF-8, seen other bytes", None, None]


def test_libsvm(spark: SparkSession, workload: Workload, tmp_path: Path) -> None:
    (tmp_path / "x.svm").write_text(
        "+1 1:0.5 3:2\n-1\n# a comment\n1 2:1 # with a comment\nx 1:1\n1 0:1\n1 5:1\n1 3:1 2:1\n1 1:1 1:2\n1 1\n1 1:NaN\nnan 1:1\n"
    )
    source = {"format": "libsvm", "paths": str(tmp_path / "x.svm"), "schema": "y double, x sparse(4)"}
    features = {
        "label": {"column": "y", "kind": "binary", "positive": [1], "negative": [-1]},
        "inputs": {"x": {"columns": ["x"], "steps": ["sparse"]}},
    }
    rows = parsed(spark, workload(source=source, features=features))
    assert [row["_line"] for row in rows] == [1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert (rows[0]["y"], rows[0]["x"]["ids"], rows[0]["x"]["values"]) == (1.0, [0, 2], [0.5, 2.0])
    assert rows[1]["x"]["ids"] == [] and rows[2]["x"]["values"] == [1.0]
    assert [row["_reason"] for row in rows[3:]] == [
        "y: wanted a number, seen 'x'",
        "wanted indices from 1 to 4",
        "wanted indices from 1 to 4",
        "wanted rising indices",
        "wanted rising indices",
        "wanted index:value pairs",
        "wanted finite values",
        "y: wanted a finite number, seen NaN",
    ]


def test_sparks_own_sample_is_read_as_spark_reads_it(spark: SparkSession) -> None:
    source = load_config("conf/libsvm.yaml").source
    ours = parse(spark, source).orderBy("_line").collect()
    theirs = spark.read.format("libsvm").option("numFeatures", "692").load(source.paths[0]).collect()  # type: ignore[index]
    assert len(ours) == len(theirs) == 100 and all(row["_reason"] is None for row in ours)
    for a, b in zip(ours, theirs, strict=True):
        assert a["label_01"] == b["label"]
        assert a["pixels"]["ids"] == list(b["features"].indices) and a["pixels"]["values"] == list(b["features"].values)


def source_of(paths: object) -> Source:
    return Source.model_validate({"format": "csv", "paths": paths, "schema": "a int"})


def test_which_files_a_source_names(tmp_path: Path) -> None:
    for name in ("a/1.csv", "a/2.csv", "a/_SUCCESS", "a/.hidden", "b/3.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1\n")

    def names(paths: object) -> list[str]:
        return [str(f.relative_to(tmp_path)) for f in raw_files(source_of(paths))[""]]

    assert names(str(tmp_path / "a")) == ["a/1.csv", "a/2.csv"]
    assert names(str(tmp_path / "*" / "*.csv")) == ["a/1.csv", "a/2.csv", "b/3.csv"]
    assert names([str(tmp_path / "b"), str(tmp_path / "b" / "3.csv")]) == ["b/3.csv"]
    with pytest.raises(DataError, match="wanted csv files at .*nothing"):
        raw_files(source_of(str(tmp_path / "nothing")))


def test_the_root_of_keys_follows_from_the_config_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    before = root_of(source_of([str(tmp_path / "a" / "*.csv"), str(tmp_path / "b" / "**" / "x*.csv")]))
    assert before == tmp_path
    assert root_of(source_of(str(tmp_path / "a"))) == tmp_path / "a"
    assert (
        root_of(source_of({"train": str(tmp_path / "a" / "t.csv"), "test": str(tmp_path / "a" / "v.csv")}))
        == tmp_path / "a"
    )
