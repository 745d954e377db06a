"""The transform on Spark and on Arrow without Spark: integers bit for bit, float32 within one unit in the last place."""

import datetime
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyspark.sql import SparkSession

from pipelines.arrays import to_array, to_padded
from pipelines.config import Config, load_config
from pipelines.config.data import sparse_size
from pipelines.errors import DataError
from pipelines.features.apply import transform
from pipelines.features.apply_arrow import ArrowFeatures
from pipelines.features.fit import fit
from pipelines.features.fitted import (
    Clip,
    Fill,
    FittedCategory,
    FittedFeatures,
    FittedInput,
    FittedLabel,
    FittedNumber,
    Log1p,
    Scale,
    SignedLog,
)
from pipelines.lake import LabelSpec
from pipelines.sources.parquet import ARROW_TYPES
from tests.conftest import ROOT

ROWS = 20_000
WORKLOADS = sorted((ROOT / "conf").glob("*.yaml"))
NUMBERS = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e300, -1e300, 5e-324, 1e-9, -1e-9, 2.0**53 + 1, 1.7976e308, -3.0]
TEXTS = ["", " ", "a", "Ünïcödé", "日本語", "\U0001f600", "a\tb", "\x1f", "null", "NaN", "0", "x" * 300]
TYPES = ARROW_TYPES | {"timestamp": pa.timestamp("us", "UTC")}
TYPES |= {f"array<{name}>": pa.list_(TYPES[name]) for name in ("string", "bigint", "float", "double")}
LABEL = FittedLabel(spec=LabelSpec(kind="binary", column="y"))

EVERY_STEP = {
    "plain": {"columns": ["a"], "steps": ["impute_mean"]},
    "median": {"columns": ["a", "i", "flag"], "steps": ["impute_median", "standardize"]},
    "mode": {"columns": ["i", "flag"], "steps": ["impute_most_frequent", "min_max"]},
    "money": {"columns": ["a", "big"], "steps": [{"impute_constant": {"value": -1}}, "log1p", "standardize"]},
    "signed": {"columns": ["a", "big"], "steps": ["impute_mean", "signed_log", "robust_scale"]},
    "clipped": {
        "columns": ["a", "small"],
        "steps": ["impute_median", {"clip": {"quantiles": [0.05, 0.95]}}, "standardize"],
    },
    "bounded": {"columns": ["a"], "steps": ["impute_mean", {"clip": {"low": -1, "high": 2}}, "signed_log", "min_max"]},
    "buckets": {"columns": ["a", "i"], "steps": [{"bucketize": {"quantiles": 7}}]},
    "borders": {"columns": ["a", "i"], "steps": ["impute_median", {"bucketize": {"splits": [-3, 0, 2.5]}}]},
    "when": {
        "columns": ["day", "at"],
        "steps": [
            {"date": {"parts": ["year", "quarter", "month", "week", "day", "day_of_week", "day_of_year", "hour"]}},
            "impute_median",
            "standardize",
        ],
    },
    "cycle": {"columns": ["at"], "steps": [{"date": {"parts": ["month", "day_of_week", "minute"], "cyclic": True}}]},
    "weekday": {"columns": ["day"], "steps": [{"date": {"parts": ["day_of_week"]}}, {"bucketize": {"splits": [6]}}]},
    "age": {"columns": ["at"], "steps": [{"age": {"against": "day"}}, "impute_mean", "signed_log"]},
    "per": {"columns": ["a", "big"], "steps": [{"ratio": {"by": "i"}}, "impute_median", "signed_log", "standardize"]},
    "per_bucket": {"columns": ["i"], "steps": [{"ratio": {"by": "a"}}, {"bucketize": {"quantiles": 4}}]},
    "missing": {"columns": ["a", "i", "color", "day"], "steps": ["missing_indicator"]},
    "ids": {"columns": ["color", "i", "flag", "day"], "steps": [{"vocabulary": {"min_count": 2}}]},
    "hashed": {"columns": ["color", "i", "flag", "day", "big"], "steps": [{"hash": {"buckets": 11}}]},
    "crossed": {"columns": ["color", "flag"], "steps": ["cross", {"hash": {"buckets": 1000}}]},
    "pairs": {"columns": ["color", "i", "flag"], "steps": ["cross", "vocabulary"]},
    "often": {"columns": ["color", "i"], "steps": [{"frequency": {"min_count": 3}}]},
    "mean": {"columns": ["color", "day"], "steps": ["target"]},
    "words": {
        "columns": ["text"],
        "steps": [
            {"tokens": {"ngrams": 2}},
            {"vocabulary": {"min_count": 3, "max_size": 200}},
            {"bag": {"length": 4, "weighting": "tf_idf"}},
        ],
    },
    "hashed_words": {
        "columns": ["text"],
        "steps": ["tokens", {"hash": {"buckets": 20}}, {"bag": {"length": 3, "weighting": "tf_idf"}}],
    },
    "latent": {
        "columns": ["text"],
        "steps": [
            "tokens",
            {"vocabulary": {"max_size": 12, "max_share": 0.5}},
            {"bag": {"length": 9, "weighting": "tf_idf", "other": False, "unit": True}},
            {"svd": {"components": 3}},
        ],
    },
    "order": {
        "columns": ["text"],
        "steps": [{"tokens": {"lower": False}}, "vocabulary", {"sequence": {"length": 4, "keep": "last"}}],
    },
    "tags": {"columns": ["tags"], "steps": ["vocabulary", {"bag": {"length": 3}}]},
    "weighted": {"columns": ["seen"], "steps": ["vocabulary", {"bag": {"length": 3, "weights": "how_much"}}]},
    "last": {"columns": ["seen"], "steps": [{"hash": {"buckets": 9}}, {"sequence": {"length": 2, "keep": "last"}}]},
    "v": {"columns": ["v"], "steps": [{"vector": {"width": 4}}, "standardize", {"pca": {"components": 2}}]},
    "v_scaled": {"columns": ["v"], "steps": [{"vector": {"width": 4}}, "min_max"]},
    "v_turned": {"columns": ["v"], "steps": [{"vector": {"width": 4}}, {"pca": {"components": 4}}]},
    "photo": {"columns": ["photo"], "steps": [{"image": {"shape": [4, 3, 3], "encoded": True}}]},
    "gray": {"columns": ["photo"], "steps": [{"image": {"shape": [5, 6], "encoded": True}}]},
}
SCHEMA = (
    "a double, small float, i int, big bigint, flag boolean, color string, day date, at timestamp, y int, text string, "
    "tags array<string>, seen array<bigint>, how_much array<float>, v array<double>, photo binary"
)
WORDS = ["the", "The", "a", "fox", "Füchse", "日本", "\U0001f600", "x1", "-", "..", " ", "", "don't", "ΣΑΣ", "İ"]


def picture(generator: np.random.Generator) -> bytes:
    """A small PNG or JPEG file of any mode."""
    height, width = generator.integers(1, 9, 2)
    mode = str(generator.choice(["L", "RGB", "RGBA", "1", "P"]))
    image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
    file = io.BytesIO()
    image.save(file, "JPEG" if mode in ("L", "RGB") and generator.random() < 0.5 else "PNG")
    return file.getvalue()


def column(name: str, dtype: str, num: int, generator: np.random.Generator, *, nasty: bool) -> pa.Array:
    """Values of a schema's type; nasty ones hold nulls, NaN, infinities, unseen and unusual values."""
    if dtype.startswith("sparse("):
        size, longest = sparse_size(dtype), 6
        ids = [
            sorted(generator.choice(size, generator.integers(0 if nasty else 1, longest), False)) for _ in range(num)
        ]
        values = [generator.normal(size=len(row)).tolist() for row in ids]
        fields = [pa.array(ids, pa.list_(pa.int32())), pa.array(values, pa.list_(pa.float64()))]
        return pa.StructArray.from_arrays(fields, ["ids", "values"])
    if name == "photo":  # a picture that no decoder takes fails the stage
        return pa.array([picture(generator) for _ in range(num)], pa.binary())
    if name in ("seen", "how_much"):  # of one length
        lengths = np.random.default_rng(num).integers(0, 6, num)
        lists = [generator.integers(-3, 4, length).tolist() for length in lengths]
        return pa.array([None if i % 97 == 0 else row for i, row in enumerate(lists)], TYPES[dtype])
    if name == "v":
        return pa.array((generator.normal(size=(num, 4)) * [1, 10, 0.1, 0] + 1e3).tolist(), TYPES[dtype])
    if dtype == "array<string>":
        lists = [generator.choice(WORDS, generator.integers(0, 6)).tolist() for _ in range(num)]
        return pa.array([None if nasty and i % 7 == 0 else [None, *row] for i, row in enumerate(lists)], TYPES[dtype])
    if name == "text":
        words = WORDS + [first + second for first in "bcdfghjk" for second in "lmnpqrst"]
        texts = [" ".join(generator.choice(words, generator.integers(0, 9))) for _ in range(num)]
        return pa.array([None if nasty and i % 7 == 0 else text for i, text in enumerate(texts)])
    if dtype in ("float", "double"):
        found: list[Any] = generator.normal(0, 10, num).tolist()
        odd: list[Any] = NUMBERS
    elif dtype in ("int", "bigint"):
        found = generator.integers(-5, 6, num).tolist()
        odd = [2**31 - 1, -(2**31), 0] if dtype == "int" else [2**63 - 1, -(2**63), 2**53 + 1]
    elif dtype == "boolean":
        found, odd = generator.integers(0, 2, num).astype(bool).tolist(), []
    elif dtype == "date":
        found = [datetime.date(2020, 1, 1) + datetime.timedelta(int(d)) for d in generator.integers(0, 9, num)]
        odd = [datetime.date(1, 1, 1), datetime.date(9999, 12, 31), datetime.date(1582, 10, 10)]
    elif dtype == "timestamp":
        start = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)
        found = [start + datetime.timedelta(microseconds=int(m)) for m in generator.integers(0, 10**14, num)]
        odd = [start.replace(year=1), start.replace(year=9999), start.replace(year=1969, microsecond=999_999)]
    else:
        found, odd = [f"v{i}" for i in generator.geometric(0.2, num)], TEXTS
    if nasty:
        for at in np.flatnonzero(generator.random(num) < 0.3):
            found[at] = generator.choice(np.array([None, *odd], dtype=object))
    return pa.array(found, TYPES[dtype])


def raw(config: Config, num: int, *, seed: int, nasty: bool) -> pa.Table:
    """Rows of the workload's schema; the label is one that it takes."""
    generator = np.random.default_rng(seed)
    label, images = (
        config.features.label,
        {g.columns[0]: g for g in config.features.inputs.values() if g.kind == "image"},
    )
    columns: dict[str, Any] = {"row_id": pa.array(range(num), pa.int64())}
    for name, dtype in config.source.columns.items():
        if label and name == label.column and label.kind == "next_token":
            texts = column(name, dtype, num, generator, nasty=nasty)
            columns[name] = texts if nasty else pa.array([f"ab{text}" for text in texts.to_pylist()])
        elif label and name == label.column:
            known = label.positive + label.negative or label.classes or [0, 1]
            texts = [known[i] for i in generator.integers(0, len(known), num)] if known else []
            columns[name] = pa.array(texts).cast(TYPES[dtype])
        elif name in images and not images[name].steps[0].options.encoded:
            length = math.prod(images[name].steps[0].options.shape)
            columns[name] = pa.array([generator.bytes(length) for _ in range(num)], pa.binary())
        else:
            columns[name] = column(name, dtype, num, generator, nasty=nasty)
    splits = generator.choice(config.split.names, num)
    return pa.table(columns | {"_split": pa.array(splits.tolist())})


def assert_alike_on_both(spark: SparkSession, fitted: FittedFeatures, rows: pa.Table) -> None:
    """Apply on both engines and compare."""
    found = transform(spark.createDataFrame(rows), fitted, keep=["row_id"]).orderBy("row_id").toArrow()
    tensors = ArrowFeatures(fitted)(rows)
    columns = [
        c for c in fitted.contract(sparse_widths={}).columns if c.name in found.column_names and c.kind != "row_id"
    ]
    assert [c.name for c in columns] == list(tensors)
    for spec in columns:
        convert = to_padded if spec.kind.startswith("sparse") else to_array
        wanted = convert(found.column(spec.name), spec, where="Spark")
        got = tensors[spec.name]
        assert got.dtype == wanted.dtype and got.shape == wanted.shape, spec.name
        if got.dtype == np.float32:
            assert_ulp(got, wanted, spec.name)
        else:
            np.testing.assert_array_equal(got, wanted, spec.name)


def assert_ulp(got: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32], what: str) -> None:
    same = (np.isnan(got) & np.isnan(wanted)) | (got == wanted)
    near = np.abs(got.view(np.int32).astype(np.int64) - wanted.view(np.int32)) <= 1
    assert (same | near).all(), f"{what}: {got[~(same | near)][:5]} {wanted[~(same | near)][:5]}"


@pytest.mark.parametrize("path", WORKLOADS, ids=lambda path: path.stem)
def test_a_workload_on_nasty_rows(spark: SparkSession, path: Path) -> None:
    config = load_config(path)
    fitted = fit(spark.createDataFrame(raw(config, 2_000, seed=1, nasty=False)), config).fitted
    assert_alike_on_both(spark, fitted, raw(config, ROWS, seed=2, nasty=True))


def test_every_step_on_nasty_rows(spark: SparkSession, workload: Callable[..., Path]) -> None:
    config = every_step(workload)
    clean = raw(config, 2_000, seed=1, nasty=False)
    fitted = fit(spark.createDataFrame(clean), config).fitted
    again = FittedFeatures.model_validate_json(fitted.model_dump_json())
    assert again == fitted
    rows = raw(config, ROWS, seed=2, nasty=True)
    assert_alike_on_both(spark, again, rows)
    assert_alike_on_both(spark, again, rows.slice(ROWS - 100))
    assert_alike_on_both(spark, again, rows.slice(7, 1))


def every_step(workload: Callable[..., Path]) -> Config:
    features = {"label": {"column": "y", "kind": "binary", "positive": [1], "negative": [0]}, "inputs": EVERY_STEP}
    source = {"format": "parquet", "paths": "x", "schema": SCHEMA}
    return load_config(workload("", source=source, features=features, classic=None, model={"network": "mlp"}))


FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
STEPS = st.one_of(
    st.just(Log1p()),
    st.just(SignedLog()),
    st.tuples(FINITE, FINITE).map(lambda pair: Clip(low=min(pair), high=max(pair))),
    st.tuples(FINITE, st.floats(0, 1e6)).map(lambda pair: Scale(shift=pair[0], factor=pair[1])),
)
CHAINS = st.tuples(FINITE, st.lists(STEPS, max_size=4)).map(lambda pair: (Fill(value=pair[0]), *pair[1]))


TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=8)


@settings(max_examples=25, deadline=None)
@given(
    chains=st.lists(CHAINS, min_size=1, max_size=8),
    splits=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=6, unique=True).map(sorted),
    values=st.lists(st.tuples(st.one_of(st.none(), st.floats()), st.one_of(st.none(), TEXT)), min_size=1, max_size=60),
    seed=st.one_of(st.integers(0, 100), st.just(2**40)),
)
def test_any_steps_on_any_values(
    spark: SparkSession,
    chains: list[Any],
    splits: list[float],
    values: list[tuple[float | None, str | None]],
    seed: int,
) -> None:
    numbers, texts = [number for number, _ in values], [text for _, text in values]
    known = tuple(dict.fromkeys(texts[::2]))
    fitted = FittedFeatures(
        inputs=(
            FittedInput(
                name="x", kind="dense", columns=tuple(FittedNumber(column="a", steps=chain) for chain in chains)
            ),
            FittedInput(name="b", kind="ids", columns=(FittedNumber(column="a", splits=tuple(splits)),)),
            FittedInput(
                name="c",
                kind="ids",
                columns=(
                    FittedCategory(column="t", values=known),
                    FittedCategory(column="t", buckets=97, seed=seed),
                    FittedCategory(column=("t", "t"), buckets=9, seed=seed),
                ),
            ),
        ),
        label=LABEL,
    )
    rows = pa.table(
        {
            "row_id": pa.array(range(len(numbers)), pa.int64()),
            "a": pa.array(numbers, pa.float64(), from_pandas=False),
            "t": pa.array(texts, pa.string()),
        }
    )
    assert_alike_on_both(spark, fitted, rows)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"t": "x"}, "wanted a column 'a', seen t"),
        ({"a": "12", "t": "x"}, "column 'a': wanted numbers, seen string"),
        ({"a": 1, "t": 1.5}, "column 't': wanted text, whole numbers, booleans or dates, seen double"),
    ],
)
def test_rows_that_do_not_fit(row: dict[str, Any], message: str) -> None:
    number = FittedNumber(column="a", steps=(Fill(value=0.0),))
    category = FittedCategory(column="t", values=("x",))
    inputs = (
        FittedInput(name="x", kind="dense", columns=(number,)),
        FittedInput(name="c", kind="ids", columns=(category,)),
    )
    with pytest.raises(DataError, match=message):
        ArrowFeatures(FittedFeatures(inputs=inputs, label=LABEL))(pa.Table.from_pylist([row]))
