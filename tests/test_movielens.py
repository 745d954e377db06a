"""Generated ratings: the format, the same bytes for the same parameters, and the truth's own figures."""

import json
from pathlib import Path

import numpy as np
import pytest
from pyspark.sql import SparkSession

from pipelines import movielens
from pipelines.config import Config, load_config
from pipelines.errors import ConfigError
from pipelines.sources.files import raw_files
from pipelines.sources.prepare import prepare

ROWS = 2_050


def config_of(rows: int = ROWS, seed: int = 0) -> Config:
    return load_config("conf/ratings.yaml", [f"source.prepare.rows={rows}", f"source.prepare.seed={seed}"])


def lines_of(config: Config) -> list[str]:
    prepare(config)
    return [line for path in raw_files(config.source)[""] for line in path.read_text().splitlines()]


def test_the_same_bytes_for_the_same_parameters(
    spark: SparkSession, lake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = lines_of(config_of())
    table = np.array([line.split("\t") for line in lines], dtype=np.int64)
    assert table.shape == (ROWS, 4)
    users, items, ratings, times = table.T
    assert set(users) == set(range(1, 14)) and items.min() >= 1 and set(ratings) == {1, 2, 3, 4, 5}
    assert len({(user, item) for user, item in zip(users, items, strict=True)}) == ROWS, "nobody rates an item twice"
    for user in range(1, 14):
        assert 30 <= (users == user).sum() <= 290 and (np.diff(times[users == user]) > 0).all()
    monkeypatch.setattr(movielens, "FILE_ROWS", 500)
    drawn = movielens.draw(spark, rows=ROWS, seed=0)
    assert drawn.rdd.getNumPartitions() == 5
    again = drawn.select("user", "item", "rating", "time").toPandas().sort_values(["user", "time"])
    assert np.array_equal(again.to_numpy(), table[np.lexsort((times, users))])
    assert set(lines_of(config_of(seed=1))).isdisjoint(lines)
    with pytest.raises(ConfigError, match="wanted a whole number of at least 1000, seen 10"):
        prepare(config_of(10))


def test_the_truth_is_measured_on_the_last_ratings(spark: SparkSession, lake: Path) -> None:
    config = config_of(20_000)
    prepare(config)
    truth = json.loads((raw_files(config.source)[""][0].parent / "truth.json").read_text())
    rows = movielens.draw(spark, rows=20_000, seed=0).toPandas()
    last = rows[rows.is_last]
    assert (
        truth["rows"] == len(last) == 125
        and (last.time == rows.groupby("user").time.transform("max")[last.index]).all()
    )
    assert truth["rmse"] == pytest.approx(np.sqrt(np.mean((last.expected - last.rating) ** 2)), abs=1e-6)
    found = last.place[last.place <= 10]
    assert truth["recall_at_10"] == pytest.approx(len(found) / 125, abs=1e-6)
    assert truth["ndcg_at_10"] == pytest.approx(np.sum(1 / np.log2(found + 1)) / 125, abs=1e-6)
    assert abs((rows.expected - rows.rating).mean()) < 0.02, "the mean of what may have been rated"
    counts = rows.item.value_counts()
    assert counts.iloc[:62].sum() > 3 * counts.iloc[-62:].sum(), "a tenth of the items is far more popular than another"
