"""Values too many for the fitted transform's JSON stay in tables, and give what they would give inside it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from pipelines.config import Config, load_config
from pipelines.features import apply, fit_values, lookups
from pipelines.features.apply import transform
from pipelines.features.apply_arrow import ArrowFeatures
from pipelines.features.fit import fit
from pipelines.features.fitted import FittedCategory, FittedFeatures
from pipelines.lake import table_path
from pipelines.predict import loaded
from pipelines.tracking import ModelRef
from tests.stages import run

Workload = Callable[..., Path]
INPUTS: dict[str, Any] = {
    "ids": {"columns": ["color", "a"], "steps": ["vocabulary"]},
    "few": {"columns": ["color"], "steps": [{"vocabulary": {"min_count": 2, "max_size": 5}}]},
    "often": {"columns": ["color"], "steps": [{"frequency": {"min_count": 2}}]},
    "mean": {"columns": ["color"], "steps": [{"target": {"folds": 3, "min_count": 2}}]},
    "pair": {"columns": ["color", "a"], "steps": ["cross", "vocabulary"]},
}


@pytest.fixture
def config(workload: Workload) -> Config:
    source = {"format": "csv", "paths": "x", "schema": "a int, color string, y int"}
    label = {"column": "y", "kind": "binary", "positive": [1]}
    return load_config(workload("", source=source, features={"label": label, "inputs": INPUTS}))


def table(num: int) -> pa.Table:
    generator = np.random.default_rng(0)
    colors = [None if c == 3 else "" if c == 4 else f"c{c}ü" for c in generator.geometric(0.05, num).tolist()]
    return pa.table(
        {
            "row_id": pa.array(generator.integers(-(2**62), 2**62, num)),
            "a": pa.array(generator.integers(0, 30, num), pa.int32()),
            "color": pa.array(colors),
            "y": pa.array(generator.integers(0, 2, num), pa.int32()),
            "_split": pa.array(["test" if i % 5 == 0 else "train" for i in range(num)]),
        }
    )


def test_stored_values_give_what_inline_ones_give(
    spark: SparkSession, lake: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = table(3_000)
    frame = spark.createDataFrame(rows)
    inline = fit(frame, config)
    monkeypatch.setattr(fit_values, "INLINE_BYTES", 0)
    monkeypatch.setattr(apply, "HEAD_VALUES", 3)
    monkeypatch.setattr(lookups, "_FEW", 0)
    found = fit(frame, config)
    assert len([note for note in found.notes if "stay in a table" in note]) == 6, found.notes
    assert found.passes == inline.passes
    stored = FittedFeatures.model_validate_json(found.fitted.model_dump_json())
    assert "c1ü" not in stored.model_dump_json()

    def result(fitted: FittedFeatures, fitted_on: Any = None) -> list[dict[str, Any]]:
        made = transform(frame, fitted, keep=["row_id"], fitted_on=fitted_on).orderBy("row_id")
        return made.toArrow().to_pylist()

    assert result(stored) == result(inline.fitted)
    in_train = F.col("_split") == "train"
    assert result(stored, in_train) == result(inline.fitted, in_train) != result(stored)
    sizes = {c.name: c.sizes for c in inline.fitted.contract(sparse_widths={}).columns}
    assert {c.name: c.sizes for c in stored.contract(sparse_widths={}).columns} == sizes
    given, wanted = ArrowFeatures(stored)(rows), ArrowFeatures(inline.fitted)(rows)
    for name in wanted:
        np.testing.assert_array_equal(given[name], wanted[name], name)
    again = fit(frame, config)
    assert again.fitted.digest == stored.digest != inline.fitted.digest, "one content, one digest"


def test_two_values_with_one_hash(
    spark: SparkSession, lake: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_values, "INLINE_BYTES", 0)
    rows = table(500)
    stored = fit(spark.createDataFrame(rows), config).fitted
    wanted = ArrowFeatures(stored)(rows)
    monkeypatch.setattr(lookups, "_hashes", lambda texts: np.array([len(t) for t in texts.to_pylist()], np.uint64))
    given = ArrowFeatures(stored)(rows)
    for name in wanted:
        np.testing.assert_array_equal(given[name], wanted[name], name)


def test_a_model_takes_its_values_along(
    spark: SparkSession, lake: Path, workload: Workload, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The candidates score with the copies beside them, whatever becomes of the workload's tables."""
    monkeypatch.setattr(fit_values, "INLINE_BYTES", 0)
    text = "".join(f"{i % 7},{i},c{i % 11},{(i % 11) % 2}\n" for i in range(400))
    features = {
        "label": {"column": "y", "kind": "binary", "positive": [1]},
        "inputs": {"ids": {"columns": ["color"], "steps": ["vocabulary"]}},
    }
    path = workload(text, features=features, classic=[{"estimator": "LogisticRegression"}], gate={"require": {}})
    receipts = run(path, "ingest", "features", "classic")
    ref = ModelRef.model_validate(receipts["classic"].result["models"][0])
    with loaded(ref, tmp_path) as model:
        (column,) = model.bundle.fitted.inputs[0].columns
        assert isinstance(column, FittedCategory) and column.stored is not None
        assert Path(column.stored.folder).is_relative_to(model.path) and column.stored.size == 11
        assert model.bundle.fitted.digest == ref.features
        ids = transform(spark.createDataFrame([("c0",), ("new",)], "color string"), model.bundle.fitted, keep=[])
        assert ids.collect()[1]["ids"] == [0] and ids.collect()[0]["ids"][0] > 0
    assert json.loads((table_path("tiny", "features") / "fitted.json").read_text())["inputs"][0]["columns"][0]["stored"]
    assert f"{table_path('tiny', 'features')}/values" in " ".join(receipts["features"].outputs)
