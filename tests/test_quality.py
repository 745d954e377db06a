"""Constraints reject, count or fail as declared, with exact counts; the data card says what the rows hold and moved."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from pipelines import ingest, tracking
from pipelines.card import ColumnCard, _mixture, make_card
from pipelines.card_page import page
from pipelines.config import load_config
from pipelines.config.data import Source
from pipelines.errors import DataError
from pipelines.growth import read_record
from pipelines.lake import table_path
from pipelines.receipt import Receipt
from pipelines.run import depends_on
from pipelines.stage import Given
from pipelines.tables import current_version
from tests.stages import run

Workload = Callable[..., Path]
SCHEMA = "a double, b int, color string, day date"
ROWS = "1,1,red,2026-01-01\n2,,blue,2026-01-02\n300,3,pink,2026-01-03\nx,4,red,2026-01-04\n5,5,red,\n"
HOUR = 3600.0
JANUARY_5 = 1767571200.0


def checked(workload: Workload, rows: str | None, *checks: dict[str, Any], **source: Any) -> Path:
    path = workload(rows)
    features = {"label": {"column": "a", "kind": "real"}, "inputs": {"x": {"columns": ["b"], "steps": ["standardize"]}}}
    section = {
        "format": "csv",
        "paths": str(path.parent / "raw" / "*.csv"),
        "schema": SCHEMA,
        "checks": list(checks),
        "max_rejected": 0.9,
        **source,
    }
    return workload(rows, source=section, features=features, classic=[{"estimator": "LinearRegression"}])


def test_row_constraints_reject_and_count(spark: SparkSession, lake: Path, workload: Workload) -> None:
    (lake / "colors.csv").write_text("name\nred\nblue\n")
    path = checked(
        workload,
        ROWS,
        {"not_null": ["b", "day"], "on_violation": "count"},
        {"range": {"columns": "a", "min": 0, "max": 100}},
        {"regex": {"columns": "color", "pattern": "[a-z]{3}"}, "on_violation": "count"},
        {"set": {"columns": "b", "values": [1, 3, 5]}},
        {"reference": {"columns": "color", "table": f"{lake}/colors.csv", "format": "csv", "key": "name"}},
        {"range": {"columns": "day", "min": "2026-01-02"}, "on_violation": "count"},
    )
    result = run(path, "ingest")["ingest"].result
    assert (result["rows_read"], result["rows_accepted"], result["rows_rejected"]) == (5, 3, 2)
    assert result["violations"] == {
        "not_null.b": 1,
        "not_null.day": 1,
        "range.a": 1,
        "regex.color": 2,
        "reference.color": 1,
        "range.day": 1,
    }
    rejects = spark.read.format("delta").load(result["rejects"]).orderBy("_line").collect()
    assert [(row["_line"], row["_reason"]) for row in rejects] == [
        (3, "a: wanted at least 0 and at most 100, seen 300.0"),
        (4, "a: wanted double, seen 'x'"),
    ]


def test_what_fails_leaves_the_last_version(spark: SparkSession, lake: Path, workload: Workload) -> None:
    fail = {"range": {"columns": "b", "max": 9}, "on_violation": "fail"}
    before = run(checked(workload, "1,1,red,2026-01-01\n", fail), "ingest")["ingest"]
    (lake.parent / "raw" / "more.csv").write_text("2,10,red,2026-01-02\n3,3,red,2026-01-03\n")
    with pytest.raises(DataError, match=r"range\.b: 1 rows \(fail\); the table stays as it is"):
        run(checked(workload, None, fail), "ingest")
    assert current_version(table_path("tiny", "raw")) == before.result["snapshot"]["version"]
    (row,) = spark.read.format("delta").load(before.result["rejects"]).collect()
    assert (row["_file"], row["_line"], row["_reason"]) == ("more.csv", 1, "b: wanted at most 9, seen 10")


def test_constraints_of_the_table_hold_over_all_its_files(spark: SparkSession, lake: Path, workload: Workload) -> None:
    checks = [
        {"unique": ["b", "color"]},
        {"row_count": {"max_ratio": 3.0}, "on_violation": "count"},
    ]
    raw = lake.parent / "raw"
    before = run(checked(workload, "1,1,red,\n1,1,blue,\n1,,blue,\n1,,blue,\n", *checks), "ingest")["ingest"]
    assert before.result["violations"] == {}, "a row with a missing value is like no other"
    (raw / "more.csv").write_text("".join(f"1,{n},red,\n" for n in range(2, 12)))
    grown = run(checked(workload, None, *checks), "ingest")["ingest"]
    assert grown.result["violations"] == {"row_count": 1}
    (raw / "again.csv").write_text("1,1,red,\n1,1,red,\n")
    with pytest.raises(DataError, match=r"unique\.b\.color: 2 rows too many, as b=1, color=red \(fail\)"):
        run(checked(workload, None, *checks), "ingest")
    assert current_version(table_path("tiny", "raw")) == grown.result["snapshot"]["version"]


def test_a_reference_that_changed_is_looked_at_anew(
    spark: SparkSession, lake: Path, workload: Workload, capsys: pytest.CaptureFixture[str]
) -> None:
    known = lake / "known.csv"
    check = {"reference": {"columns": "b", "table": str(known), "format": "csv", "key": "id"}}
    known.write_text("id\n1\n2\n")
    path = checked(workload, "1,1,red,\n2,3,red,\n", check)
    assert run(path, "ingest")["ingest"].result["rows_rejected"] == 1
    known.write_text("id\n1\n2\n3\n")
    assert run(path, "ingest")["ingest"].result["rows_rejected"] == 0
    assert f"reference {known} changed" in capsys.readouterr().out
    known.write_text("name\nred\n")
    with pytest.raises(DataError, match=r"reference of b: wanted a column 'id' in .*known\.csv, seen name"):
        run(path, "ingest")


class _NoRun:
    """Where a stage's metrics go that nobody reads."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def test_freshness_by_a_given_clock(spark: SparkSession, lake: Path, workload: Workload) -> None:
    path = checked(
        workload,
        "1,1,red,2026-01-03\n2,2,red,2026-01-04\n3,3,red,\n",
        {"freshness": {"column": "day", "max_hours": 25}},
    )
    config = load_config(path)
    stage = Given(config=config, inputs={}, run=_NoRun(), made_from=depends_on(config, "ingest", {}))  # type: ignore[arg-type]
    assert ingest.build(stage, now=JANUARY_5 + HOUR).rows == 3
    stale = r"freshness\.day: the newest is 26\.0 hours old, 25 are allowed \(fail\)"
    with pytest.raises(DataError, match=stale):
        ingest.build(stage, now=JANUARY_5 + 2 * HOUR)
    (lake / "tables" / "tiny" / "raw_record").rename(lake / "gone")
    with pytest.raises(DataError, match=stale):
        ingest.build(stage, now=JANUARY_5 + 2 * HOUR)


def test_rows_that_grew_old_are_no_longer_up_to_date(
    spark: SparkSession, lake: Path, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checked(workload, "1,1,red,2026-01-04\n", {"freshness": {"column": "day", "max_hours": 48}})
    monkeypatch.setattr("time.time", lambda: JANUARY_5)
    first = run(path, "ingest")["ingest"]
    assert run(path, "ingest")["ingest"] == first
    monkeypatch.setattr("time.time", lambda: JANUARY_5 + 25 * HOUR)
    with pytest.raises(DataError, match="the newest is 49.0 hours old, 48 are allowed"):
        run(path, "ingest")


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ({"not_null": ["c"]}, r"checks\.0\.not_null: a column of the schema, .*seen 'c'"),
        ({"range": {"columns": "color", "max": 1}}, "column 'color': wanted type int or .* seen string"),
        ({"range": {"columns": "day", "max": 1}}, "column 'day': wanted values of type date, seen 1"),
        ({"range": {"columns": "b", "min": 2, "max": 1}}, "wanted min at most max, seen 2 and 1"),
        ({"range": {"columns": "b"}}, "wanted min, max or both"),
        ({"set": {"columns": "b", "values": ["1"]}}, "wanted values of type int, seen '1'"),
        ({"set": {"columns": "a", "values": [1]}}, "seen double"),
        ({"regex": {"columns": "b", "pattern": "x"}}, "wanted type string, seen int"),
        ({"regex": {"columns": "color", "pattern": "("}}, "wanted a regular expression"),
        ({"unique": ["b"], "on_violation": "reject"}, "wanted count or fail, seen reject"),
        ({"freshness": {"column": "a", "max_hours": 1}}, "wanted type date or timestamp, seen double"),
        ({"row_count": {}}, "wanted min_ratio, max_ratio or both"),
        ({"unique": ["b"], "not_null": ["b"]}, "wanted one of .*, seen not_null, unique"),
        ({"on_violation": "fail"}, "seen none"),
    ],
)
def test_impossible_constraints_are_refused(check: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Source.model_validate({"format": "csv", "paths": "x", "schema": SCHEMA, "checks": [check]})


def test_a_constraint_stands_once() -> None:
    checks = [{"not_null": ["a", "b"]}, {"not_null": ["b"]}]
    with pytest.raises(ValidationError, match=r"checks\.1\.not_null: .* seen not_null\.b in checks\.0 as well"):
        Source.model_validate({"format": "csv", "paths": "x", "schema": SCHEMA, "checks": checks})


def test_the_card_says_what_the_rows_hold(spark: SparkSession) -> None:
    number = F.col("id").cast("double")
    rows = spark.range(1000).select(
        F.xxhash64("id").alias("row_id"),
        F.when(F.col("id") % 4 > 0, number).alias("x"),
        F.when(F.col("id") % 10 == 0, F.lit("a")).otherwise(F.concat(F.lit("<b>"), F.col("id") % 2)).alias("t"),
        F.date_from_unix_date((F.col("id") % 10).cast("int")).alias("d"),
        F.array(number, number).alias("v"),
        F.lit(None).cast("int").alias("none"),
    )
    columns = {"x": "double", "t": "string", "d": "date", "v": "array<double>", "none": "int"}
    card = make_card(rows, columns, num_bytes=1)
    x, t, d = card["x"], card["t"], card["d"]
    assert (card.rows, x.present, x.min, x.max) == (1000, 750, 1.0, 999.0)
    ids = np.arange(1000)[np.arange(1000) % 4 > 0]
    assert (x.mean, x.std) == (pytest.approx(ids.mean()), pytest.approx(ids.std()))
    assert x.distinct == pytest.approx(750, rel=0.1) and t.distinct == 3 and d.distinct == 10
    np.testing.assert_allclose(x.quantiles, np.quantile(ids, np.linspace(0, 1, 101)), atol=5)
    assert t.top == (("<b>1", 500), ("<b>0", 400), ("a", 100)) and t.mean is None
    assert (d.min, d.max) == (0.0, 9 * 86400.0) and card["v"].mean == 2.0
    assert card["none"].present == 0 and card["none"].max is None
    html = page(card, title="what <is> there")
    assert "&lt;b&gt;1 50.0%" in html and "<b>1 " not in html and "1970-01-10" in html and "what &lt;is&gt;" in html


def test_cards_add_up_and_drift_is_named(spark: SparkSession) -> None:
    def rows(first: int, num: int, shift: float, color: str) -> Any:
        return spark.range(first, first + num).select(
            F.xxhash64("id").alias("row_id"),
            (F.pmod(F.col("id") * 7919, F.lit(1000)) / 10 + shift).alias("x"),
            F.when(F.col("id") % 2 == 0, F.lit("red")).otherwise(F.lit(color)).alias("t"),
        )

    columns = {"x": "double", "t": "string"}
    old, new = rows(0, 4000, 0.0, "blue"), rows(4000, 1000, 50.0, "pink")
    first = make_card(old, columns, num_bytes=1)
    more = make_card(new, columns, num_bytes=1, last=first)
    both, whole = first.followed_by(more), make_card(old.union(new), columns, num_bytes=1)
    for name in columns:
        a, b = both[name], whole[name]
        assert (a.present, a.distinct, a.min, a.max, a.top) == (b.present, b.distinct, b.min, b.max, b.top)
    assert both["x"].mean == pytest.approx(whole["x"].mean) and both["x"].std == pytest.approx(whole["x"].std)
    np.testing.assert_allclose(both["x"].quantiles, whole["x"].quantiles, atol=1.0)
    x, t = more.drift_from(first)
    assert x.psi is not None and x.psi > 1 and x.js is None
    assert t.psi is not None and t.psi > 1 and t.js == pytest.approx(0.5)
    same = make_card(rows(4000, 1000, 0.0, "blue"), columns, num_bytes=1).drift_from(first)
    assert all(moved.psi < 0.01 and moved.missing == 0 for moved in same if moved.psi is not None)


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60),
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60),
)
@example([0.0, 2.2e-313], [0.0])
@example([0.0], [0.0, 2.2e-313, 1.0])
def test_a_mixture_of_percentiles_lies_between_its_parts(a: list[float], b: list[float]) -> None:
    parts = [np.quantile(values, np.linspace(0, 1, 101)) for values in (a, b)]
    mixed = np.array(_mixture(*parts, len(b) / (len(a) + len(b))))
    assert (np.diff(mixed) >= 0).all()
    slack = 1e-6 * (1 + np.abs(mixed))
    assert (mixed >= np.minimum(*parts) - slack).all() and (mixed <= np.maximum(*parts) + slack).all()
    assert mixed[0] == pytest.approx(min(a + b), abs=1e-3) and mixed[-1] == pytest.approx(max(a + b), abs=1e-3)


def test_the_card_and_its_drift_are_in_mlflow(
    spark: SparkSession, lake: Path, workload: Workload, capsys: pytest.CaptureFixture[str]
) -> None:
    run(checked(workload, "".join(f"{n},{n},red,2026-01-01\n" for n in range(50))), "ingest")
    (lake.parent / "raw" / "more.csv").write_text("".join(f"{n + 40},{n},blue,2026-01-01\n" for n in range(50)))
    receipt: Receipt = run(checked(workload, None), "ingest")["ingest"]
    assert "drift against the version before (PSI): color" in capsys.readouterr().out
    import mlflow

    client = mlflow.MlflowClient()
    assert {"card.html", "card.json"} <= {artifact.path for artifact in client.list_artifacts(receipt.run_id)}
    card = mlflow.artifacts.load_dict(f"runs:/{receipt.run_id}/card.json")
    assert card["rows"] == 100 and "sketch" not in card["columns"][0]
    assert client.get_run(receipt.run_id).data.metrics["psi.a"] > 0.2
    record = read_record(table_path("tiny", "raw"))
    assert record is not None and record.card["a"].present == 100 and math.isclose(record.card["b"].mean or 0, 24.5)
    assert isinstance(record.card["a"], ColumnCard) and tracking.tracking_uri()
