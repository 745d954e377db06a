"""Splits: by time as well, the same when rows arrive; what leaks through them is found."""

from collections.abc import Callable
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from pipelines.config import load_config
from pipelines.errors import ConfigError, DataError
from pipelines.features.leaks import telling_features
from pipelines.features.sample import MAX_ROWS, Sample, take_sample
from pipelines.features.shuffle import shuffle_quality
from pipelines.features.split import with_split
from pipelines.lake import Column, LabelSpec
from tests.stages import run
from tests.tables import BINARY, DENSE, IDS, contract_of, feature_table

Workload = Callable[..., Path]
Rows = Callable[..., str]

SOURCE = "customer int, day {}, a double, y int"
FEATURES = {
    "label": {"column": "y", "kind": "binary", "positive": [1], "negative": [0]},
    "inputs": {"dense": {"columns": ["a"], "steps": ["impute_mean"]}},
}
BOUNDARIES = {"validation": "2024-05-01", "test": "2024-06-01"}


def timed(workload: Workload, rows: str = "", *, kind: str = "date", **split: Any) -> Path:
    """A workload of (customer, day, a, y), split by day."""
    path = workload(
        rows or None, split={"time": {"column": "day", "boundaries": BOUNDARIES}, **split}, features=FEATURES
    )
    path.write_text(path.read_text().replace("a double, b double, color string, y int", SOURCE.format(kind)))
    return path


def test_days_and_moments_in_utc(spark: SparkSession, workload: Workload) -> None:
    days = ["2024-04-30", "2024-05-01", "2024-05-31", "2024-06-01", None]
    rows = spark.createDataFrame([(day,) for day in days], "day string").selectExpr("cast(day as date) day")
    found = with_split(rows, load_config(timed(workload))).collect()
    assert [row["_split"] for row in found] == ["train", "validation", "validation", "test", None]
    moments = ["2024-05-31 23:59:59.999999Z", "2024-06-01 00:00:00Z", "2024-06-01 01:00:00+02:00", None]
    rows = spark.createDataFrame([(m,) for m in moments], "day string").selectExpr("cast(day as timestamp) day")
    found = with_split(rows, load_config(timed(workload, kind="timestamp"))).collect()
    assert [row["_split"] for row in found] == ["validation", "test", "validation", None]
    later = ("split.time.boundaries={test: 2024-06-01 12:30:00+02:00}",)
    found = with_split(rows, load_config(timed(workload, kind="timestamp"), later)).collect()
    assert [row["_split"] for row in found] == ["train", "train", "train", None]


@pytest.mark.parametrize(
    ("split", "part"),
    [
        ("{time: {column: day, boundaries: {test: 2024}}}", "a date or a time such as 2024-06-01, seen 2024"),
        ("{time: {column: day, boundaries: {test: 2024-06-01, validation: 2024-06-01}}}", "moments that rise"),
        ("{time: {column: day, boundaries: {train: 2024-01-01, test: 2024-06-01}}}", "no boundary for train"),
        ("{time: {column: day, boundaries: {validation: 2024-06-01}}}", "splits named train and test"),
        ("{time: {column: dya, boundaries: {test: 2024-06-01}}}", "did you mean 'day'"),
        ("{time: {column: a, boundaries: {test: 2024-06-01}}}", "wanted a date or a timestamp, seen 'a', double"),
        ("{time: {column: day, boundaries: {test: 2024-06-01 12:00:00}}}", "wanted days for the date 'day'"),
        ("{time: {column: day, boundaries: {test: 2024-06-01}}, hash: {}}", "seen hash and time"),
        ("{entity: [customer]}", "wanted it in hash.by"),
        ("{last: {by: custmer, order: day}}", "did you mean 'customer'"),
        ("{last: {by: customer, order: day}, validation: {share: 0.1}}", "a validation split is given already"),
        ("{last: {by: customer, order: day}, entity: [customer]}", "each entity stands in every split"),
        ("{position: {}, entity: [customer]}", "wanted none with 'position'"),
        ("{position: {shares: {train: 0.9, test: 0.2}}}", "wanted shares that add up to 1, seen 1.1"),
        ("{position: {}, validation: {share: 0.1}}", "a validation split is given already"),
        ("{time: {column: day, boundaries: {test: 2024-06-01}}, entity: [custmer]}", "did you mean 'customer'"),
    ],
)
def test_splits_that_cannot_be_are_refused(workload: Workload, split: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(timed(workload), (f"split={split}",))
    assert part in str(caught.value)


def test_each_file_is_cut_from_its_first_row_to_its_last(spark: SparkSession, workload: Workload) -> None:
    config = load_config(timed(workload), ("split={position: {shares: {train: 0.5, validation: 0.3, test: 0.2}}}",))
    lines = {"a": range(1, 11), "b": range(1, 4), "c": range(3, 6), "d": [1]}  # two of c were rejected
    raw = [(file, line) for file, of_file in lines.items() for line in of_file]
    rows = with_split(spark.createDataFrame(raw, "_file string, _line long").repartition(3), config).collect()
    found = {file: [row["_split"] for row in sorted(rows) if row["_file"] == file] for file in lines}
    assert found["a"] == ["train"] * 5 + ["validation"] * 3 + ["test"] * 2
    assert found["b"] == ["train", "validation", "test"]
    assert found["c"] == ["validation", "validation", "test"]
    assert found["d"] == ["validation"]


LAST = {"last": {"by": "customer", "order": "day", "test": 2, "validation": 1}}
VISIT = st.tuples(
    st.one_of(st.none(), st.integers(0, 5)), st.one_of(st.none(), st.dates(date(2024, 1, 1), date(2024, 1, 9)))
)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(visits=st.lists(VISIT, min_size=1, max_size=60))
def test_the_last_rows_of_each_entity(spark: SparkSession, workload: Workload, visits: list[Any]) -> None:
    """Ties by the row's id; a row without a day comes first, and one without an entity trains."""
    config = load_config(timed(workload), (f"split={LAST}",))
    numbered = [(number, *visit) for number, visit in enumerate(visits)]
    rows = spark.createDataFrame(numbered, "row_id long, customer int, day date").repartition(3)
    found = {row["row_id"]: row["_split"] for row in with_split(rows, config).collect()}
    wanted = dict.fromkeys(range(len(visits)), "train")
    for customer in {c for c, _ in visits if c is not None}:
        mine = sorted((day or date.min, number) for number, c, day in numbered if c == customer)
        if len(mine) > 3:
            wanted |= {number: "validation" for _, number in mine[-3:-2]} | {number: "test" for _, number in mine[-2:]}
    assert found == wanted


MOMENT = st.datetimes(datetime(2024, 4, 1), datetime(2024, 7, 1))
ROW = st.tuples(st.integers(0, 9), MOMENT)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=st.lists(ROW, min_size=1, max_size=30), arriving=st.lists(ROW, max_size=30), way=st.integers(0, 2))
def test_a_row_keeps_its_split_when_rows_arrive(
    spark: SparkSession, workload: Workload, before: list[Any], arriving: list[Any], way: int
) -> None:
    ways = (
        {"time": {"column": "day", "boundaries": BOUNDARIES}, "validation": None},
        {"time": {"column": "day", "boundaries": {"test": "2024-06-01"}}, "validation": {"share": 0.3}},
        {"time": None, "hash": {"by": ["customer"], "shares": {"train": 0.5, "test": 0.5}}},
    )
    config = load_config(timed(workload, kind="timestamp", **ways[way]))

    def splits(rows: list[Any]) -> list[str]:
        numbered = [(i, customer, day) for i, (customer, day) in enumerate(rows)]
        table = spark.createDataFrame(numbered, "row_id bigint, customer int, day timestamp_ntz")
        table = table.selectExpr("row_id", "customer", "cast(day as timestamp) day")
        found = {row["row_id"]: row["_split"] for row in with_split(table, config).collect()}
        return [found[i] for i in range(len(rows))]

    assert splits(before + arriving)[: len(before)] == splits(before)


def entries(num: int, *, customers: int = 10**9) -> list[tuple[int, date, float, int]]:
    """Rows of (customer, day, a, y) from April to June."""
    generator = np.random.default_rng(0)
    a = generator.normal(size=num)
    y = (a + generator.normal(size=num) > 0).astype(int)
    return [(i % customers, date(2024, 4, 1) + timedelta(days=i % 90), float(a[i]), int(y[i])) for i in range(num)]


def as_csv(rows: list[tuple[Any, ...]]) -> str:
    return "".join(",".join(str(value) for value in row) + "\n" for row in rows)


def test_rows_on_both_sides_are_counted(spark: SparkSession, lake: Path, workload: Workload) -> None:
    rows = entries(300)
    train = [row for row in rows if row[1] < date(2024, 5, 1)][:3]
    twins = [(i, date(2024, 6, 15), a, y) for i, (_, _, a, y) in enumerate(train)]
    path = timed(workload, as_csv(rows + twins))
    done = run(path, "ingest", "features")["features"]
    test = done.result["snapshots"]["test"]["rows"]
    assert done.result["leaks"] == {"duplicates": {"test": 3}, "features": {}}
    assert done.result["input_reads"] == ["statistics", "values", "write"], "looked for in the tables written"
    assert done.result["shuffle"]["train"]["rows"] == done.result["snapshots"]["train"]["rows"]
    with pytest.raises(DataError, match=rf"3 rows of test \({3 / test:.2%}\) equal a training row"):
        run(path, "features", overrides=("split.leaks.duplicates=fail",))


def test_an_entity_on_both_sides(spark: SparkSession, lake: Path, workload: Workload, capsys: Any) -> None:
    by_customer = [(i // 100, *row[1:]) for i, row in enumerate(sorted(entries(270), key=lambda row: row[1]))]
    path = timed(workload, as_csv(by_customer), entity=["customer"], leaks={"duplicates": "off"})
    run(path, "ingest")
    with pytest.raises(DataError, match=r"seen 2 in several, such as customer=0 in train and validation"):
        run(path, "features")
    done = run(path, "features", overrides=("split.leaks.entities=warn",))["features"]
    assert done.result["input_reads"][0] == "entities" and "customer=0 in train" in capsys.readouterr().out


def test_a_row_without_a_moment(spark: SparkSession, lake: Path, workload: Workload) -> None:
    path = timed(workload, as_csv(entries(90)) + "1,,0.5,1\n2,,0.5,0\n")
    run(path, "ingest")
    with pytest.raises(DataError, match=r"split\.time: wanted a moment in every row, 2 rows have none in 'day'"):
        run(path, "features")


def sample_of(label: np.ndarray[Any, Any], **inputs: np.ndarray[Any, Any]) -> Sample:
    """A sample of one file; whole numbers are ids."""
    columns = [Column(name="label", kind="label", dtype="int64")]
    for name, values in inputs.items():
        is_id = values.dtype == np.int64
        columns.append(
            Column(name=name, kind="ids" if is_id else "dense", dtype="int64" if is_id else "float32", shape=(1,))
        )
    return Sample(tuple(columns), ({"label": label, **{name: v.reshape(-1, 1) for name, v in inputs.items()}},))


@pytest.mark.parametrize("kind", ["binary", "multiclass", "real"])
def test_a_feature_that_is_the_label_is_found(kind: Any) -> None:
    generator = np.random.default_rng(1)
    num, classes = 4000, {"binary": 2, "multiclass": 5, "real": 1}[kind]
    y = generator.normal(size=num) if kind == "real" else generator.integers(0, classes, num)
    as_ids = np.round(y * 8).astype(np.int64) if kind == "real" else y * 7 + 3
    found = telling_features(
        sample_of(
            y,
            same=(y * -3 + generator.normal(size=num) * 1e-3).astype(np.float32),
            coded=as_ids,
            noisy=(y + generator.normal(size=num)).astype(np.float32),
            unique=np.arange(num),
            constant=np.zeros(num, dtype=np.float32),
        ),
        LabelSpec(kind=kind, column="y"),
    )
    assert {name.split()[0] for name in found} == {"same", "coded"}
    assert all(0.99 < value <= 1 for value in found.values())


def test_a_feature_that_is_one_of_the_classes_is_found() -> None:
    generator = np.random.default_rng(1)
    has = (generator.random((4000, 3)) < 0.3).astype(np.int8)
    sample = sample_of(
        has, same=has[:, 1] * -2.0 + 1, coded=has[:, 2].astype(np.int64), noisy=generator.normal(size=4000)
    )
    found = telling_features(sample, LabelSpec(kind="multilabel", column="y", classes=("a", "b", "c")))
    assert {name.split()[0] for name in found} == {"same", "coded"}


def test_a_rare_class_alone_tells_nothing() -> None:
    y = np.zeros(1000, dtype=np.int64)
    y[:9] = 1
    assert not telling_features(sample_of(y, same=y.astype(np.float32)), BINARY)
    rare = np.where(np.arange(5000) % 500 == 0, np.arange(5000) % 3, 1)
    guess = sample_of(rare, noise=np.random.default_rng(0).normal(size=5000).astype(np.float32))
    assert not telling_features(guess, LabelSpec(kind="multiclass", column="y"))


def test_the_figure_of_a_shuffle(tmp_path: Path) -> None:
    snapshot = feature_table(tmp_path / "t", [3000, 2000, 1000], contract_of(DENSE, IDS))
    sample = take_sample(snapshot)
    shuffled = shuffle_quality(sample)
    assert shuffled.rows == 6000 and shuffled.is_shuffled
    assert shuffled.label_run_length == pytest.approx(1.0, abs=0.05)
    by_label = shuffle_quality(_reordered(sample, "label"))
    assert not by_label.is_shuffled and (by_label.label_run_length or 0) > 100
    by_value = shuffle_quality(_reordered(sample, "dense"))
    assert not by_value.is_shuffled and by_value.column == "dense 3" and by_value.neighbour_correlation > 0.9


def _reordered(sample: Sample, name: str) -> Sample:
    """The sample with the rows of each file sorted by a column."""
    files = []
    for file in sample.files:
        order = np.argsort(file[name].reshape(len(file[name]), -1)[:, -1], kind="stable")
        files.append({key: values[order] for key, values in file.items()})
    return Sample(sample.columns, tuple(files))


def test_files_sorted_by_label_are_not_shuffled() -> None:
    label = Column(name="label", kind="label", dtype="int64")
    files = tuple({"label": np.full(500, number, dtype=np.int64)} for number in (0, 1))
    quality = shuffle_quality(Sample((label,), files))
    assert quality.label_run_length == pytest.approx(250, rel=0.01) and not quality.is_shuffled


def test_a_sample_is_bounded(tmp_path: Path) -> None:
    snapshot = feature_table(tmp_path / "t", [20_000] * 10, contract_of(DENSE))
    sample = take_sample(snapshot)
    assert len(sample.files) == 8 and len(sample.whole("label")) == MAX_ROWS
