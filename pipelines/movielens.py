"""Ratings in MovieLens's format u.data, drawn from tastes that are known.

The format: a line a rating, tab-separated: user, item, a rating from 1 to 5, seconds since 1970; users and items are
numbered from 1 (F. Harper, J. Konstan, The MovieLens Datasets: History and Context, 2015).

Users choose items by how popular these are and how well they suit, one after the other, none twice, and rate them by
the same tastes; docs/ratings.md defines it. So the best that any model can give is known: the mean of a rating's
distribution, and the order of the items by the probability that they are chosen next. A user's draws are seeded by the
user's number: the bytes follow from the parameters alone, not from the machine, its cores or Spark's partitions.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from scipy.special import ndtr

from pipelines.errors import ConfigError
from pipelines.receipt import write_json
from pipelines.session import spark_progress
from pipelines.sources.prepare import settle

Floats = npt.NDArray[np.float64]
MIN_ROWS = 1_000
USER_ROWS = 160  # ratings of a user in the mean, about those of MovieLens 1M; from a fifth of it to nine fifths
FILE_ROWS = 50_000
TOP_K = 10
FACTORS = 4
MEAN, NOISE = 3.2, 0.8  # of a rating before it is rounded, and its deviation there
_USER_STD, _ITEM_STD, _TASTE_STD = 0.3, 0.45, 0.6
_EXPONENT, _HEAD = 1.0, 10.0  # popularity by Zipf's and Mandelbrot's law: (rank + head) ** -exponent
_TASTE_WEIGHT = 4.0  # of the tastes' product in the logarithm of an item's chance
_FIRST_SECOND, _SPAN_S, _PAUSE_S = 874_724_710, 3 * 365 * 86_400, 600.0
_SCHEMA = "user int, item int, rating int, time bigint, is_last boolean, expected double, place int"


def generate(folder: Path, spark: SparkSession, *, rows: int, seed: int = 0) -> None:
    """Write `*.data` and `truth.json`: how well the truth itself finds and rates what each user chose last.

    Args:
        folder: Where to.
        spark: The session.
        rows: Ratings.
        seed: Of all draws; another one is another truth.

    Raises:
        ConfigError: Too few rows.
    """
    if not isinstance(rows, int) or rows < MIN_ROWS:
        raise ConfigError(f"source.prepare.rows: wanted a whole number of at least {MIN_ROWS}, seen {rows!r}")
    drawn = draw(spark, rows=rows, seed=seed)
    with spark_progress(spark, "movielens"):
        line = F.concat_ws("\t", *[F.col(name).cast("string") for name in ("user", "item", "rating", "time")])
        drawn.select(line).write.text(str(folder / "written"))
    settle(folder / "written", folder, suffix=".data")
    write_json(folder / "truth.json", measured(drawn))


def draw(spark: SparkSession, *, rows: int, seed: int) -> DataFrame:
    """The fields of each rating; whether it is the user's last; `expected`, the mean of all ratings that it may have
    been; and `place`, which the last item had in the order of the user's chances, without what was chosen before.
    """
    numbers = spark.range(_num_users(rows), numPartitions=math.ceil(rows / FILE_ROWS))
    return numbers.mapInArrow(_Drawing(rows, seed), _SCHEMA)


def _num_users(rows: int) -> int:
    """So many that none has more ratings than there are items, whose number grows as well."""
    return math.ceil(rows / USER_ROWS)


@dataclass(frozen=True)
class _Drawing:
    """Runs on Spark's Python workers, a task a few users."""

    rows: int
    seed: int

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for user in batch.column("id").to_pylist():
                yield self._ratings(user)

    @cached_property
    def _num_ratings(self) -> npt.NDArray[np.int64]:
        """Of each user: evenly from a fifth to nine fifths of the mean, and `rows` together."""
        users = _num_users(self.rows)
        share = self._generator(0).permutation(np.linspace(0.2, 1.8, users)) / users
        return np.diff(np.rint(np.cumsum(share) * self.rows), prepend=0).astype(np.int64)

    @cached_property
    def _items(self) -> tuple[Floats, Floats, Floats]:
        """Of each item the logarithm of its popularity, by how much it is rated higher, and what it is like."""
        num = 200 + round(3 * math.sqrt(self.rows))
        generator = self._generator(1)
        popularity = -_EXPONENT * np.log(generator.permutation(num) + _HEAD)
        return popularity, generator.normal(0, _ITEM_STD, num), generator.normal(0, 1, (num, FACTORS))

    def _ratings(self, user: int) -> pa.RecordBatch:
        popularity, item_mean, item_taste = self._items
        num = int(self._num_ratings[user])
        generator = self._generator(2, user)
        taste = item_taste @ generator.normal(0, _TASTE_STD / math.sqrt(FACTORS), FACTORS)
        chance = popularity + _TASTE_WEIGHT * taste
        # Gumbel's trick: the largest of these are drawn by their chances without replacement, and in the order of drawing.
        items = np.argsort(-(chance + generator.gumbel(size=len(chance))), kind="stable")[:num]
        mean = (MEAN + generator.normal(0, _USER_STD) + item_mean + taste)[items]
        ratings = np.clip(np.rint(mean + generator.normal(0, NOISE, num)), 1, 5)
        pauses = 1 + generator.exponential(_PAUSE_S, num).astype(np.int64)
        times = _FIRST_SECOND + int(generator.integers(_SPAN_S)) + np.cumsum(pauses)
        left = np.setdiff1d(np.arange(len(chance)), items[:-1])
        place = 1 + int((chance[left] > chance[items[-1]]).sum())
        is_last = np.arange(num) == num - 1
        columns = [np.full(num, user + 1), items + 1, ratings, times, is_last, expected(mean), np.full(num, place)]
        types = [pa.int32(), pa.int32(), pa.int32(), pa.int64(), pa.bool_(), pa.float64(), pa.int32()]
        arrays = [
            pa.array(column.astype(dtype.to_pandas_dtype())) for column, dtype in zip(columns, types, strict=True)
        ]
        return pa.RecordBatch.from_arrays(arrays, [field.split()[0] for field in _SCHEMA.split(", ")])

    def _generator(self, *purpose: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=purpose)))


def expected(mean: Floats) -> Floats:
    """The mean of ratings that are rounded and cut to 1 to 5, by their mean before: 1, and 1 more with each boundary."""
    above = ndtr((mean[:, None] - np.array([1.5, 2.5, 3.5, 4.5])) / NOISE)
    found: Floats = 1.0 + above.sum(axis=1)
    return found


def measured(drawn: DataFrame) -> dict[str, float]:
    """What the truth does with each user's last rating; no model can be expected to do better."""
    hit = F.col("place") <= TOP_K
    error = F.col("expected") - F.col("rating")
    row = drawn.where("is_last").agg(
        F.count(F.lit(1)).alias("rows"),
        F.sqrt(F.avg(error * error)).alias("rmse"),
        F.avg(F.when(hit, 1.0 / F.log2(F.col("place") + 1)).otherwise(0.0)).alias(f"ndcg_at_{TOP_K}"),
        F.avg(hit.cast("double")).alias(f"recall_at_{TOP_K}"),
    )
    found = row.toArrow().to_pylist()[0]
    return {name: value if name == "rows" else round(value, 6) for name, value in found.items()}
