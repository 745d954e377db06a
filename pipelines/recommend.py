"""The items that users are recommended: those of the largest products of the user's vector with the items' vectors.

Whatever gives users and items vectors is ranked alike: ALS, a two-tower network, and popularity as vectors of one number.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import Column, DataFrame, Observation
from pyspark.sql import functions as F

from pipelines.arrays import one_chunk
from pipelines.features.apply import transform
from pipelines.features.fitted import FittedFeatures
from pipelines.tables import kept, schema_of

USER, ITEM = "_user", "_item"  # the source's own values
USER_ID, ITEM_ID = "_user_id", "_item_id"  # in the vocabulary; 0 is out of it
_BLOCK = 1 << 24  # products that a worker holds at a time


@dataclass(frozen=True)
class Factors:
    """Vectors of users and items, each with the columns `_id` (bigint) and `vector` (array<float>, of one width)."""

    users: DataFrame
    items: DataFrame


@contextmanager
def kept_factors(factors: Factors) -> Iterator[Factors]:
    """The vectors in memory or on disk, for the time of the body."""
    with kept(factors.users) as users, kept(factors.items) as items:
        yield Factors(users, items)


def choices(rows: DataFrame, fitted: FittedFeatures) -> DataFrame:
    """Raw rows as the features have them, with `row_id`, `_split`, and user and item as values and as ids."""
    assert fitted.recommended is not None, "asked for only with the section"
    inputs = {group.name: group for group in fitted.inputs}
    named = {USER: fitted.recommended.user, ITEM: fitted.recommended.item}
    values = {column: F.col(str(inputs[name].columns[0].name)) for column, name in named.items()}
    found = transform(rows.withColumns(values), fitted, keep=["row_id", "_split", *named])
    return found.withColumns({USER_ID: F.col(named[USER])[0], ITEM_ID: F.col(named[ITEM])[0]})


def histories(chosen: DataFrame) -> DataFrame:
    """A row a user of what `choices` gives: `USER`, `USER_ID`, and `history`, what the user chose in which split."""
    history = F.collect_set(F.struct("_split", ITEM, ITEM_ID)).alias("history")
    return chosen.groupBy(USER).agg(F.max(USER_ID).alias(USER_ID), history)


def items_in(*splits: str) -> Column:
    """The ids of what a user of `histories` chose in the splits, in all where none is named."""
    history = F.filter("history", lambda choice: choice["_split"].isin(*splits)) if splits else F.col("history")
    return F.transform(history, lambda choice: choice[ITEM_ID])


@contextmanager
def top_k(users: DataFrame, factors: Factors, *, k: int, scratch: Path) -> Iterator[DataFrame]:
    """The `k` items of the largest products for each user, for the time of the body.

    Args:
        users: With `USER_ID`, and `seen`, the ids of items that are not recommended.
        factors: The vectors; those of the items are written once, and read by each worker.
        k: How many; fewer where a user has seen nearly all, none without a vector.
        scratch: A folder that all nodes see.

    Yields:
        The columns of `users`, then `items` (array<bigint>, the best first) and their `scores` (array<float>).
    """
    vectors = factors.users.withColumnRenamed("_id", USER_ID)
    with TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder:
        factors.items.select("_id", "vector").write.mode("overwrite").parquet(folder)
        joined = users.join(vectors, on=USER_ID, how="left").select(*users.columns, "vector")
        yield joined.mapInArrow(_Ranking(folder, k), f"{schema_of(users)}, items array<bigint>, scores array<float>")


@contextmanager
def recommendations(
    chosen: DataFrame, factors: Factors, *, k: int, scratch: Path, observed: Observation
) -> Iterator[DataFrame]:
    """What each user of `chosen` is recommended: `user`, `item`, `rank` from 1, `score`, and `row_id`, a hash of the two.

    Args:
        chosen: What `choices` gives; none of a user's items is recommended again.
        factors: The vectors; an item that is not in `chosen` is left out.
        k: Items for a user.
        scratch: A folder that all nodes see.
        observed: Takes how many `users` are recommended how many `items` together.
    """
    items = chosen.where(F.col(ITEM_ID) > 0).groupBy(F.col(ITEM_ID).alias("_id")).agg(F.min(ITEM).alias(ITEM))
    here = Factors(factors.users, factors.items.join(F.broadcast(items), on="_id", how="left_semi"))
    users = histories(chosen).select(USER, USER_ID, items_in().alias("seen"))
    with top_k(users, here, k=k, scratch=scratch) as ranked:
        num = F.size("items")
        ranked = ranked.observe(observed, F.count_if(num > 0).alias("users"), F.sum(num).alias("items"))
        found = F.posexplode(F.arrays_zip("items", "scores")).alias("place", "found")
        rows = ranked.select(F.col(USER).alias("user"), found).withColumn("_id", F.col("found.items"))
        yield rows.join(F.broadcast(items), on="_id").select(
            F.xxhash64("user", ITEM).alias("row_id"),
            "user",
            F.col(ITEM).alias("item"),
            (F.col("place") + 1).alias("rank"),
            F.col("found.scores").alias("score"),
        )


class _Ranking:
    """Runs on Spark's Python workers."""

    def __init__(self, items: str, k: int) -> None:
        self.items, self.k = items, k

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        ids, vectors = _read_items(self.items)
        rows = max(1, _BLOCK // len(ids))
        for batch in batches:
            for start in range(0, batch.num_rows, rows):
                yield self._ranked(batch.slice(start, rows), ids, vectors)

    def _ranked(self, users: pa.RecordBatch, ids: npt.NDArray[np.int64], vectors: Any) -> pa.RecordBatch:
        """The users with their items: what they have seen comes last, and is cut off."""
        vector, seen = users.column("vector"), users.column("seen")
        scores = np.full((len(users), len(ids)), -np.inf, dtype=np.float32)
        scores[vector.is_valid().to_numpy(zero_copy_only=False)] = (
            _matrix(vector.drop_null(), vectors.shape[1]) @ vectors.T
        )
        user, item = np.repeat(np.arange(len(users)), np.diff(seen.offsets)), seen.flatten().to_numpy()
        place = np.minimum(np.searchsorted(ids, item), len(ids) - 1)
        is_known = ids[place] == item
        scores[user[is_known], place[is_known]] = -np.inf
        chosen = best(scores, self.k)
        values = np.take_along_axis(scores, chosen, axis=1)
        is_left = values > -np.inf
        offsets = pa.array(np.append(0, np.cumsum(is_left.sum(axis=1))), pa.int32())
        lists = [pa.ListArray.from_arrays(offsets, pa.array(part[is_left])) for part in (ids[chosen], values)]
        kept = [name for name in users.schema.names if name != "vector"]
        return pa.RecordBatch.from_arrays([*map(users.column, kept), *lists], [*kept, "items", "scores"])


def best(scores: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """The places of the `k` largest numbers of each row, the largest first; of equal ones the first. Shape (rows, k)."""
    k = min(k, scores.shape[1])
    places = np.sort(np.argpartition(-scores, k - 1, axis=1)[:, :k], axis=1)
    order = np.argsort(-np.take_along_axis(scores, places, axis=1), axis=1, kind="stable")
    return np.take_along_axis(places, order, axis=1)


@lru_cache(maxsize=2)
def _read_items(folder: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Ids in rising order, and their vectors."""
    table = pq.read_table(folder).sort_by("_id")
    vectors = one_chunk(table.column("vector"))
    return table.column("_id").to_numpy(), _matrix(vectors, len(vectors[0]))


def _matrix(vectors: pa.ListArray, width: int) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = vectors.flatten().to_numpy().astype(np.float32)
    return values.reshape(-1, width)
