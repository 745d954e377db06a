"""As-of joins: the latest row before each row's time, and never one of its future."""

from collections.abc import Callable
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from pipelines.config import load_config
from pipelines.config.data import Join, Source
from pipelines.errors import ConfigError, DataError
from pipelines.features.leaks import telling_features
from pipelines.features.sample import Sample
from pipelines.joins import join_as_of
from pipelines.lake import Column, LabelSpec, Snapshot
from pipelines.receipt import changed
from pipelines.run import depends_on
from pipelines.tables import read_table
from tests.stages import run

Workload = Callable[..., Path]

START = datetime(2024, 1, 1)
MOMENT = st.none() | st.integers(0, 40).map(lambda hours: START + timedelta(hours=6 * hours))
KEY = st.none() | st.integers(0, 3)


def source_with(join: Join) -> Source:
    """A source of which only the join counts."""
    text = str(Path(__file__))
    return Source.model_validate(
        {"format": "csv", "paths": text, "schema": "customer int, day timestamp", "joins": [join]}
    )


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    left=st.lists(st.tuples(KEY, MOMENT), min_size=1, max_size=40),
    right=st.lists(st.tuples(KEY, MOMENT, st.none() | st.integers(0, 99)), max_size=40),
    strict=st.booleans(),
    max_age_days=st.none() | st.integers(1, 4),
)
def test_as_pandas_joins(
    spark: SparkSession, tmp_path: Path, left: list[Any], right: list[Any], strict: bool, max_age_days: int | None
) -> None:
    """Ties, nulls, keys that are not there: pandas takes the last of a tie in the table's order, as we do."""
    path = tmp_path / "history.parquet"
    schema = pa.schema([("client", pa.int32()), ("at", pa.timestamp("us", "UTC")), ("value", pa.int64())])
    pq.write_table(pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in right], schema), path)
    join = Join(
        table={"format": "parquet", "paths": str(path), "schema": "client int, at timestamp, value bigint"},  # type: ignore[arg-type]
        by={"customer": "client"},
        time={"left": "day", "right": "at"},  # type: ignore[arg-type]
        strict=strict,
        max_age_days=max_age_days,
        prefix="last_",
    )
    numbered = [(i, "f", i, *row) for i, row in enumerate(left)]
    rows = spark.createDataFrame(numbered, "id int, _file string, _line int, customer int, day timestamp_ntz")
    rows = rows.selectExpr("id", "_file", "_line", "customer", "cast(day as timestamp) day")
    found = join_as_of(rows, source_with(join)).collect()
    seen = {row["id"]: (row["last_value"], row["last_at"]) for row in found}
    assert len(found) == len(seen) == len(left), "one row out for each row in"
    assert seen == _pandas(left, right, strict, max_age_days)


def _pandas(left: list[Any], right: list[Any], strict: bool, max_age_days: int | None) -> dict[int, Any]:
    """By `merge_asof` where a row has a key and a time."""
    wanted: dict[int, Any] = dict.fromkeys(range(len(left)), (None, None))
    rows = [(i, key, at) for i, (key, at) in enumerate(left) if key is not None and at is not None]
    history = [(key, at, number) for number, (key, at, _) in enumerate(right) if key is not None and at is not None]
    if not rows or not history:
        return wanted
    joined = pd.merge_asof(
        pd.DataFrame(rows, columns=["id", "key", "at"]).sort_values("at", kind="stable"),
        pd.DataFrame(history, columns=["key", "at", "number"]).sort_values("at", kind="stable"),
        on="at",
        by="key",
        allow_exact_matches=not strict,
        tolerance=pd.Timedelta(days=max_age_days) if max_age_days else None,
    )
    for row in joined.dropna(subset=["number"]).itertuples():
        _, at, value = right[int(row.number)]  # type: ignore[arg-type]
        wanted[int(row.id)] = (value, at)  # type: ignore[arg-type]
    return wanted


SCHEMA = "customer int, day date, amount double, y int"
FEATURES = {
    "label": {"column": "y", "kind": "binary", "positive": [1], "negative": [0]},
    "inputs": {"dense": {"columns": ["amount", "late"], "steps": [{"impute_constant": {"value": 0}}]}},
}


def planted(tmp_path: Path) -> tuple[str, Path]:
    """Applications, and statements of which those after an application tell how it ended."""
    generator = np.random.default_rng(0)
    lines, statements = [], []
    for customer in range(400):
        day = date(2024, 1, 1) + timedelta(days=int(generator.integers(0, 300)))
        y = int(generator.integers(0, 2))
        lines.append(f"{customer},{day},{generator.normal():.3f},{y}\n")
        statements += [(customer, day - timedelta(days=20), float(generator.integers(0, 3)))]
        statements += [(customer, day, 50.0 + 40 * y), (customer, day + timedelta(days=30), 50.0 + 40 * y)]
    names = ["customer", "statement_day", "late"]
    table = pa.table(dict(zip(names, map(list, zip(*statements, strict=True)), strict=True)))
    table = table.set_column(0, "customer", table["customer"].cast(pa.int32()))
    write_deltalake(str(tmp_path / "statements"), table)
    return "".join(lines), tmp_path / "statements"


def test_a_planted_leak(spark: SparkSession, lake: Path, workload: Workload, tmp_path: Path, capsys: Any) -> None:
    text, statements = planted(tmp_path)
    path = workload(text, features={**FEATURES, "inputs": {"dense": {"columns": ["amount"], "steps": ["impute_mean"]}}})
    source = f"source.schema={SCHEMA}"
    schema = "customer int, statement_day date, late double"
    join = (
        f"{{table: {{format: delta, paths: {statements}, schema: '{schema}'}}, by: [customer], "
        "time: {left: day, right: statement_day}}"
    )
    inputs = "features.inputs.dense={columns: [amount, late], steps: [{impute_constant: {value: 0}}]}"

    def overrides(joined: str) -> tuple[str, ...]:
        return (source, f"source.joins=[{joined}]", inputs)

    as_of = run(path, "ingest", "features", overrides=overrides(join))
    assert as_of["features"].result["leaks"]["features"] == {}
    assert as_of["ingest"].result["joins"] == [{"paths": [str(statements)], "versions": [0]}]
    raw = read_table(spark, Snapshot.model_validate(as_of["ingest"].result["snapshot"]))
    assert raw.count() == 400 and raw.where("statement_day < day and late < 3").count() == 400

    at_once = join.replace("by:", "strict: false, by:")  # the statement of the day itself is one of its outcome
    same_day = run(path, "ingest", "features", overrides=overrides(at_once))
    assert same_day["features"].result["leaks"]["features"] == {"late": 1.0}
    assert "'late' alone tells the label: AUC 1.0000" in capsys.readouterr().out

    latest = spark.read.format("delta").load(str(statements)).groupBy("customer").agg({"late": "last"})
    plain = raw.join(latest.toDF("customer", "latest"), "customer", "left").toPandas()
    columns = (Column(name="latest", kind="dense", dtype="float32"),)
    sample = Sample(columns, ({"label": plain["y"].to_numpy(), "latest": plain["latest"].to_numpy()},))
    assert telling_features(sample, LabelSpec(kind="binary", column="y")) == {"latest": 1.0}, "as a plain join leaks"

    config = load_config(path, overrides(join))
    before = depends_on(config, "ingest", {})
    more = {"customer": pa.array([1], pa.int32()), "statement_day": [START.date()], "late": [1.0]}
    write_deltalake(str(statements), pa.table(more), mode="append")
    assert changed(before, depends_on(config, "ingest", {})) == ["joined files"]


def test_a_row_of_the_joined_table_that_does_not_fit(spark: SparkSession, workload: Workload, tmp_path: Path) -> None:
    (tmp_path / "h.csv").write_text("1,2024-01-01,3\n1,soon,4\n")
    table = {"format": "csv", "paths": str(tmp_path / "h.csv"), "schema": "customer int, at date, late double"}
    join = Join.model_validate({"table": table, "by": "customer", "time": {"left": "day", "right": "at"}})
    with pytest.raises(DataError, match=r"h\.csv line 2: at: wanted date, seen 'soon'"):
        join_as_of(spark.createDataFrame([(1, "f", 1)], "customer int, _file string, _line int"), source_with(join))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("by: [custmer]", "did you mean 'customer'"),
        ("by: {color: customer}", "wanted one type, seen color string and customer int"),
        ("time: {left: a, right: at}", "wanted dates or timestamps, seen a double, at date"),
        ("prefix: null", "column 'b' is there already; give the join a prefix"),
        ("max_age_days: 0", "greater than or equal to 1"),
        ("table: {format: libsvm, paths: x, schema: 'y double, x sparse(3)'}", "wanted csv, parquet or delta"),
    ],
)
def test_joins_that_cannot_be_are_refused(workload: Workload, change: str, part: str) -> None:
    path = workload("")
    key, _, _ = change.partition(": ")
    table = "table: {format: csv, paths: x, schema: 'customer int, at date, b double'}"
    parts = {"table": table, "by": "by: [customer]", "time": "time: {left: day, right: at}", "prefix": "prefix: last_"}
    parts[key] = change
    schema = "source.schema=customer int, day date, a double, b double, color string, y int"
    with pytest.raises(ConfigError) as caught:
        load_config(path, (schema, f"source.joins=[{{{', '.join(parts.values())}}}]"))
    assert part in str(caught.value)
