"""Rows in the format of Criteo's display-advertising challenge, with clicks drawn from a truth that is known.

The format: a line a row, tab-separated: the label (0 or 1), the integers I1 to I13, the categories C1 to C26 as eight
hexadecimal digits; an empty field is a missing value (Criteo Labs, Display Advertising Challenge, Kaggle 2014). Numbers
of distinct values, shares of missing ones and the share of clicks are about Criteo's.

The truth is logistic, and a function of the fields as they are written, so that its probabilities are the best that
any model can give; docs/ctr.md defines it. Every draw is a hash of the row's number: the bytes follow from the
parameters alone, not from the machine, its cores or Spark's partitions.
"""

import hashlib
import math
import struct
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.errors import ConfigError
from pipelines.receipt import write_json
from pipelines.session import spark_progress
from pipelines.sources.prepare import settle

LABEL = "clicked"
MIN_ROWS = 1_000
TEST_SHARE = 0.1
FILE_ROWS = 50_000
_EXPONENT = 1.1  # of Zipf's law
_INTERCEPT = -1.1
_BINS = 1 << 16
_SPREAD = math.sqrt(3.0)  # half the width of a uniform variable of variance 1
_LOGISTIC_STD = math.pi / math.sqrt(3.0)


@dataclass(frozen=True)
class Integer:
    """A column of counts, log-logistic: `median * (u / (1 - u)) ** shape`, cut to a whole number.

    Attributes:
        missing: Share of rows without a value.
        effect: On the logit, a standard deviation of log(1 + x).
        absent: On the logit, where it is missing.
        lowest: What a count of 0 is written as.
    """

    median: float
    shape: float
    missing: float
    effect: float
    absent: float = 0.0
    lowest: int = 0


@dataclass(frozen=True)
class Category:
    """A column of categories, whose ranks follow Zipf's law.

    Attributes:
        size: Distinct values.
        missing: Share of rows without a value.
        effect: Standard deviation over the values of their effects on the logit.
    """

    size: int
    missing: float
    effect: float


INTEGERS = {
    "I1": Integer(2, 0.8, 0.45, 0.25, absent=-0.2),
    "I2": Integer(4, 1.1, 0.0, 0.15, lowest=-2),
    "I3": Integer(8, 0.9, 0.21, 0.1),
    "I4": Integer(5, 0.6, 0.22, -0.1, absent=0.1),
    "I5": Integer(3000, 1.1, 0.03, -0.25),
    "I6": Integer(35, 0.9, 0.22, -0.2, absent=-0.1),
    "I7": Integer(4, 0.8, 0.04, 0.25),
    "I8": Integer(8, 0.6, 0.0, 0.1),
    "I9": Integer(40, 0.8, 0.04, 0.05),
    "I10": Integer(1, 0.5, 0.45, 0.15, absent=-0.2),
    "I11": Integer(2, 0.7, 0.04, 0.25),
    "I12": Integer(1, 0.7, 0.77, 0.1, absent=-0.1),
    "I13": Integer(5, 0.6, 0.22, -0.15),
}
CATEGORIES = {
    "C1": Category(1_460, 0.0, 0.25),
    "C2": Category(583, 0.0, 0.2),
    "C3": Category(10_131_227, 0.03, 0.05),
    "C4": Category(2_202_608, 0.03, 0.05),
    "C5": Category(305, 0.0, 0.2),
    "C6": Category(24, 0.12, 0.2),
    "C7": Category(12_517, 0.0, 0.2),
    "C8": Category(633, 0.0, 0.15),
    "C9": Category(3, 0.0, 0.2),
    "C10": Category(93_145, 0.0, 0.05),
    "C11": Category(5_683, 0.0, 0.2),
    "C12": Category(8_351_593, 0.03, 0.05),
    "C13": Category(3_194, 0.0, 0.15),
    "C14": Category(27, 0.0, 0.25),
    "C15": Category(14_992, 0.0, 0.15),
    "C16": Category(5_461_306, 0.03, 0.05),
    "C17": Category(10, 0.0, 0.25),
    "C18": Category(5_652, 0.0, 0.15),
    "C19": Category(2_173, 0.44, 0.15),
    "C20": Category(4, 0.44, 0.2),
    "C21": Category(7_046_547, 0.03, 0.05),
    "C22": Category(18, 0.76, 0.2),
    "C23": Category(15, 0.0, 0.2),
    "C24": Category(286_181, 0.03, 0.05),
    "C25": Category(105, 0.44, 0.2),
    "C26": Category(142_572, 0.44, 0.05),
}
# Pairs of columns whose product acts on the logit, with its weight: what a linear model cannot see.
CROSSES = {
    ("C14", "C17"): 0.4,
    ("C6", "C23"): 0.4,
    ("C5", "C9"): 0.35,
    ("C2", "C20"): 0.35,
    ("C8", "C22"): 0.35,
    ("C1", "C25"): 0.35,
    ("I2", "C14"): 0.35,
    ("I11", "C17"): 0.35,
    ("I7", "C23"): 0.35,
    ("I6", "I8"): 0.25,
}


def generate(folder: Path, spark: SparkSession, *, rows: int, seed: int = 0) -> None:
    """Write `train/*.tsv`, `test/*.tsv`, and `truth.json`: how well the truth itself does on the test split.

    Args:
        folder: Where to.
        spark: The session.
        rows: Of both splits; the last tenth is the test split.
        seed: Of all draws; another one is another truth.

    Raises:
        ConfigError: Too few rows.
    """
    if not isinstance(rows, int) or rows < MIN_ROWS:
        raise ConfigError(f"source.prepare.rows: wanted a whole number of at least {MIN_ROWS}, seen {rows!r}")
    start, end = 0, rows - round(rows * TEST_SHARE)
    for split in ("train", "test"):
        files = math.ceil((end - start) / FILE_ROWS)
        drawn = draw(spark.range(start, end, numPartitions=files), seed=seed)
        written = folder / f"{split}.written"
        with spark_progress(spark, f"criteo: {split}"):
            drawn.select(line()).write.text(str(written))
        settle(written, folder / split, suffix=".tsv")
        start, end = end, rows
    write_json(folder / "truth.json", {"split": "test", **measured(drawn)})


def draw(numbers: DataFrame, *, seed: int) -> DataFrame:
    """The label, the fields and `probability`, that of a click, for each row number in a column `id`."""
    fields = {name: _integer(name, column, seed) for name, column in INTEGERS.items()}
    fields |= {name: _category(name, column, seed) for name, column in CATEGORIES.items()}
    rows = numbers.withColumns(fields)
    rows = rows.withColumns({f"_{name}": _standardized(name, column) for name, column in INTEGERS.items()})
    rows = rows.withColumn("probability", 1.0 / (1.0 + F.exp(-_logit(seed))))
    clicked = (_uniform("id", seed, LABEL) < F.col("probability")).cast("int").alias(LABEL)
    return rows.select(clicked, *fields, "probability")


def _integer(name: str, column: Integer, seed: int) -> Column:
    u = _uniform("id", seed, name)
    count = F.floor(column.median * F.pow(u / (1.0 - u), F.lit(column.shape)))
    return _or_missing(F.least(count, F.lit(10**7)).cast("int") + column.lowest, name, column.missing, seed)


def _category(name: str, column: Category, seed: int) -> Column:
    """Zipf's law by the inverse of its distribution, taken as continuous."""
    tail = 1.0 - _EXPONENT
    rank = F.floor(F.pow(1.0 + _uniform("id", seed, name) * ((column.size + 1) ** tail - 1.0), F.lit(1.0 / tail)))
    digits = F.substring(F.hex(F.xxhash64(rank, F.lit(_salt(seed, name, "value")))), 1, 8)
    return _or_missing(F.lower(digits), name, column.missing, seed)


def _or_missing(value: Column, name: str, share: float, seed: int) -> Column:
    return F.when(_uniform("id", seed, name, "missing") >= share, value) if share else value


def _standardized(name: str, column: Integer) -> Column:
    """log(1 + x) less that of the median, in standard deviations; 0 where x is missing, as for no effect."""
    logged = F.log1p(F.greatest(F.col(name), F.lit(0)))
    scaled = (logged - math.log1p(column.median)) / (_LOGISTIC_STD * column.shape)
    return F.when(F.col(name).isNull(), 0.0).otherwise(scaled)


def _logit(seed: int) -> Column:
    terms = [F.lit(_INTERCEPT)]
    for name, integer in INTEGERS.items():
        terms.append(integer.effect * F.col(f"_{name}"))
        if integer.absent:
            terms.append(F.when(F.col(name).isNull(), integer.absent).otherwise(0.0))
    terms += [category.effect * _latent(name, seed, "effect") for name, category in CATEGORIES.items()]
    for (left, right), weight in CROSSES.items():
        terms.append(weight * _factor(left, seed, right) * _factor(right, seed, left))
    return reduce(add, terms)


def _factor(name: str, seed: int, other: str) -> Column:
    return F.col(f"_{name}") if name in INTEGERS else _latent(name, seed, other)


def _latent(name: str, seed: int, what: str) -> Column:
    """A number of mean 0 and variance 1 that belongs to the value of a column; a missing value has one as well."""
    return (_uniform(name, seed, name, what) - 0.5) * (2.0 * _SPREAD)


def _uniform(of: str, seed: int, *what: str) -> Column:
    """A number in (0, 1) by a hash of column `of`, independent for each purpose."""
    bits = F.shiftrightunsigned(F.xxhash64(of, F.lit(_salt(seed, *what))), 12)
    return (bits + 0.5) * 2.0**-52


def _salt(seed: int, *what: str) -> int:
    digest = hashlib.sha256(":".join([str(seed), *what]).encode()).digest()
    return int(struct.unpack("<q", digest[:8])[0])


def line() -> Column:
    """A row as it is written."""
    fields = [LABEL, *INTEGERS, *CATEGORIES]
    return F.concat_ws("\t", *[F.coalesce(F.col(name).cast("string"), F.lit("")) for name in fields])


def measured(drawn: DataFrame) -> dict[str, float]:
    """Rows, the share of clicks, and the log loss and AUC of the true probabilities.

    Ties count half in the AUC, and so do probabilities of one bin: at their width that moves it by less than 1e-6.
    """
    click, p = F.col(LABEL), F.col("probability")
    loss = -F.log(F.when(click == 1, p).otherwise(1.0 - p))
    bins = drawn.groupBy(F.floor(p * _BINS).alias("bin")).agg(
        F.count("*").alias("rows"), F.sum(click).alias("clicks"), F.sum(loss).alias("loss")
    )
    table = bins.toArrow().sort_by("bin")
    rows, clicks, loss = (table.column(name).to_numpy() for name in ("rows", "clicks", "loss"))
    below = np.cumsum(rows - clicks) - (rows - clicks) / 2
    num, num_clicks = int(rows.sum()), int(clicks.sum())
    return {
        "rows": num,
        "clicked": num_clicks / num,
        "log_loss": round(float(loss.sum()) / num, 9),
        "auc": round(float((clicks * below).sum()) / (num_clicks * (num - num_clicks)), 9),
    }
