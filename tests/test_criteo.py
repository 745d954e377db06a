"""Generated clicks: the format, the same bytes for the same parameters, and the truth's own figures."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from pyspark.sql import SparkSession
from sklearn.metrics import log_loss, roc_auc_score

from pipelines import criteo
from pipelines.config import load_config
from pipelines.errors import ConfigError
from pipelines.sources.files import raw_files
from pipelines.sources.prepare import prepare

ROWS = 2_000


def config_of(rows: int = ROWS, seed: int = 0) -> object:
    return load_config("conf/ctr.yaml", [f"source.prepare.rows={rows}", f"source.prepare.seed={seed}"])


def content(config: object) -> dict[str, list[str]]:
    files = raw_files(config.source)  # type: ignore[attr-defined]
    return {split: [line for path in paths for line in path.read_text().splitlines()] for split, paths in files.items()}


def test_the_same_bytes_for_the_same_parameters(
    spark: SparkSession, lake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = config_of()
    with monkeypatch.context() as patch:
        patch.setattr(criteo, "measured", lambda drawn: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(first)  # type: ignore[arg-type]
    assert not Path(first.source.paths["train"][0]).parent.exists(), "all was written but the truth"  # type: ignore
    prepare(first)  # type: ignore[arg-type]
    lines = content(first)
    assert {split: len(rows) for split, rows in lines.items()} == {"train": 1_800, "test": 200}
    for fields in (line.split("\t") for line in lines["train"]):
        assert len(fields) == 40 and fields[0] in "01"
        assert all(re.fullmatch(r"(-?\d+)?", field) for field in fields[1:14])
        assert all(re.fullmatch(r"([0-9a-f]{8})?", field) for field in fields[14:])
    monkeypatch.setattr(criteo, "FILE_ROWS", 500)
    drawn = criteo.draw(spark.range(ROWS, numPartitions=7).repartition(3), seed=0)
    assert sorted(row[0] for row in drawn.select(criteo.line()).collect()) == sorted(lines["train"] + lines["test"])
    other = config_of(seed=1)
    prepare(other)  # type: ignore[arg-type]
    assert not set(content(other)["train"]) & set(lines["train"])
    assert content(first) == lines, "another seed has a folder of its own"


def test_the_truth_is_measured_on_its_rows(spark: SparkSession, lake: Path) -> None:
    drawn = criteo.draw(spark.range(ROWS), seed=0)
    rows = drawn.toPandas()
    found = criteo.measured(drawn)
    y, p = rows["clicked"], rows["probability"]
    assert found["auc"] == pytest.approx(roc_auc_score(y, p), abs=1e-5)
    assert found["log_loss"] == pytest.approx(log_loss(y, p), abs=1e-6)
    assert 0.75 < found["auc"] < 0.85 and 0.15 < found["clicked"] < 0.35
    missing = rows.isna().mean()
    for name, column in (criteo.INTEGERS | criteo.CATEGORIES).items():
        assert missing[name] == pytest.approx(column.missing, abs=0.05), name
    assert rows["C9"].nunique() == 3 and rows["C3"].nunique() > 500 and np.mean(rows["C3"].value_counts().iloc[0]) > 50


def test_the_truth_lies_beside_the_rows(spark: SparkSession, lake: Path) -> None:
    config = config_of()
    prepare(config)  # type: ignore[arg-type]
    folder = Path(config.source.paths["test"][0]).parents[1]  # type: ignore[attr-defined]
    truth = json.loads((folder / "truth.json").read_text())
    of_test = criteo.draw(spark.range(1_800, ROWS), seed=0)
    assert truth == {"split": "test", **criteo.measured(of_test)} and truth["rows"] == 200
    with pytest.raises(ConfigError, match="wanted a whole number of at least 1000, seen 10"):
        prepare(config_of(10))  # type: ignore[arg-type]
