"""How well recommendations find what users chose: candidates, the champion and popularity on the same users."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from pipelines.arrays import as_column
from pipelines.bootstrap import Floats
from pipelines.config import Config
from pipelines.config.recommend import RANKED
from pipelines.features.fitted import FittedFeatures
from pipelines.lake import Recommended, scratch_path, table_path
from pipelines.metrics import Metrics, paired
from pipelines.predict import Loaded, factors
from pipelines.recommend import USER, USER_ID, Factors, choices, histories, items_in, kept_factors, top_k
from pipelines.tables import kept, read_table, write_table

POPULARITY = "popularity"
_BEFORE = {"validation": ("train",), "test": ("train", "validation")}  # whose items are not recommended again


@dataclass(frozen=True)
class Ranking:
    """The rankings of each model for each user of validation and test.

    Attributes:
        table: What `judged` gives, with the columns `candidate` and `split`.
        path: Of that table.
        metrics: By (candidate, split).
    """

    table: DataFrame
    path: str
    metrics: dict[tuple[str, str], Metrics]

    def baselines(self) -> list[dict[str, Any]]:
        """What candidates are looked at beside."""
        validation = self.metrics.get((POPULARITY, "validation"), {})
        return [{"name": POPULARITY, "metrics": self.metrics[POPULARITY, "test"], "validation": validation}]

    def user_values(self, models: Sequence[str], metric: str) -> tuple[Floats, dict[str, Floats]] | None:
        """The metric of each user of test, see `metrics.paired`; None where it is not one of rankings."""
        rows = self.table.where("split = 'test'").withColumn("label", F.lit(0.0))
        return paired(rows.withColumn("value", F.col(metric)), models) if metric in RANKED else None


def rank_all(rows: DataFrame, models: Mapping[str, Loaded], fitted: FittedFeatures, config: Config) -> Ranking:
    """Rank the items for each user of validation and test by each model that can, and by popularity.

    Args:
        rows: All raw rows with their split.
        models: By name.
        fitted: The transform whose counts say what is popular.
        config: The workload.
    """
    assert config.recommend is not None, "asked for only with the section"
    transforms = {name: model.bundle.fitted for name, model in models.items() if model.bundle.has_factors}
    transforms[POPULARITY] = fitted
    k, parts, catalogue = config.recommend.top_k, [], {}
    with ExitStack() as until_written:
        enter = until_written.enter_context
        chosen = {each.digest: enter(kept(choices(rows, each))) for each in transforms.values()}
        users = {digest: enter(kept(histories(found))) for digest, found in chosen.items()}
        for name, each in transforms.items():
            assert each.recommended is not None, "what has factors has users and items"
            catalogue[name] = len(each.recommended.item_counts) - 1
            mine = chosen[each.digest]
            vectors = popularity(mine, each.recommended) if name == POPULARITY else factors(mine, models[name])
            vectors = enter(kept_factors(vectors))
            for split in config.split.names[1:]:
                asked = users[each.digest].withColumns({"held": items_in(split), "seen": items_in(*_BEFORE[split])})
                asked = asked.where(F.size("held") > 0).drop("history")
                ranked = enter(top_k(asked, vectors, k=k, scratch=scratch_path(config.workload)))
                named = {"candidate": F.lit(name), "split": F.lit(split)}
                parts.append(judged(ranked, k=k).withColumns(named))
        path = table_path(config.workload, "ranked")
        snapshot = write_table(reduce(DataFrame.unionByName, parts), path, what="evaluate: rank")
    table = read_table(rows.sparkSession, snapshot)
    return Ranking(table, str(path), ranking_metrics(table, catalogue))


def popularity(chosen: DataFrame, recommended: Recommended) -> Factors:
    """Everybody is recommended what most training rows have."""
    counts = np.array(recommended.item_counts[1:], dtype=np.float32)
    table = pa.table({"_id": pa.array(np.arange(1, len(counts) + 1)), "vector": as_column(counts[:, None])})
    users = chosen.where(F.col(USER_ID) > 0).select(F.col(USER_ID).alias("_id")).distinct()
    one = F.array(F.lit(1.0).cast("float")).alias("vector")
    return Factors(users.select("_id", one), chosen.sparkSession.createDataFrame(table))


def judged(ranked: DataFrame, *, k: int) -> DataFrame:
    """How well each user's ranking finds what the user chose.

    Args:
        ranked: What `top_k` gives, with `held`, the ids of the items that are to be found; 0 is never found.
        k: The length of a ranking.

    Returns:
        `user`, `row_id` (a hash of the user), `items`, and of these `recall`, the share of the user's items that is among
        them, and `ndcg` (K. Järvelin, J. Kekäläinen, Cumulated gain-based evaluation of IR techniques, 2002; an item is
        relevant or not).
    """
    places = F.filter(F.transform("held", lambda item: F.array_position("items", item)), lambda place: place > 0)
    ideal = F.sequence(F.lit(1).cast("bigint"), F.least(F.size("held"), F.lit(k)).cast("bigint"))
    return ranked.select(
        F.col(USER).alias("user"),
        F.xxhash64(USER).alias("row_id"),
        "items",
        (_gain(places) / _gain(ideal)).alias("ndcg"),
        (F.size(places) / F.size("held")).alias("recall"),
    )


def _gain(places: Column) -> Column:
    """Discounted cumulative gain of relevant items at places from 1."""
    return F.aggregate(places, F.lit(0.0), lambda total, place: total + 1.0 / F.log2(place + 1))


def ranking_metrics(table: DataFrame, catalogue: Mapping[str, int]) -> dict[tuple[str, str], Metrics]:
    """Means over users of `ndcg` and `recall`, and `coverage`, the share of all items that somebody is recommended.

    Args:
        table: That of a Ranking.
        catalogue: How many items each candidate knows.
    """
    by = ["candidate", "split"]
    means = table.groupBy(*by).agg(F.avg("ndcg").alias("ndcg"), F.avg("recall").alias("recall"))
    shown = table.select(*by, F.explode("items").alias("item")).groupBy(*by).agg(F.count_distinct("item").alias("num"))
    found = {}
    for row in means.join(shown, on=by, how="left").collect():
        coverage = (row["num"] or 0) / max(1, catalogue[row["candidate"]])
        found[row["candidate"], row["split"]] = {"ndcg": row["ndcg"], "recall": row["recall"], "coverage": coverage}
    return found
