"""Which split a row belongs to: given, by time, by its place, the last rows of an entity, or by a hash of its key or entity."""

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from pipelines.config import Config
from pipelines.config.split import HashSplit, LastSplit, PositionSplit, TimeSplit, utc

_PLACES = 1 << 20  # shares are cut to a millionth


def with_split(rows: DataFrame, config: Config) -> DataFrame:
    """`rows` with a column `_split`, by the config; the same for a row wherever and whenever it is computed.

    Null where a split by time meets a row without one.
    """
    split = config.split
    entity = F.xxhash64(*split.hashed) if split.hashed else F.col("row_id")
    if split.by_time:
        rows = rows.withColumn("_split", _by_time(split.by_time, config.source.columns[split.by_time.column]))
    elif split.by_last:
        rows = rows.withColumn("_split", _by_last(split.by_last))
    elif split.by_position:
        rows = _by_position(rows, split.by_position)
    elif not split.given:
        shares = (split.by_hash or HashSplit()).shares
        rows = rows.withColumn("_split", _by_shares(entity, shares, config.seed, "split"))
    if split.validation:
        cut = _place(entity, config.seed, "validation") < F.lit(round(split.validation.share * _PLACES))
        moved = F.when((F.col("_split") == split.validation.source) & cut, F.lit("validation"))
        rows = rows.withColumn("_split", moved.otherwise(F.col("_split")))
    return rows


def in_train(value: Column) -> Column:
    """`value` for the rows of the training split, null for others."""
    return F.when(F.col("_split") == "train", value)


def _place(entity: Column, seed: int, purpose: str) -> Column:
    """A number in [0, 2^20) by a hash of the entity, independent for each purpose."""
    return F.pmod(F.xxhash64(entity, F.lit(f"{purpose}:{seed}")), F.lit(_PLACES))


def _by_time(by: TimeSplit, dtype: str) -> Column:
    """The last split whose boundary is not after the row."""
    chosen = F.when(F.col(by.column).isNotNull(), F.lit("train"))
    for name, moment in by.boundaries.items():
        start = utc(moment).isoformat() if dtype == "timestamp" else utc(moment).date().isoformat()
        chosen = F.when(F.col(by.column) >= F.lit(start).cast(dtype), F.lit(name)).otherwise(chosen)
    return chosen


def _by_last(by: LastSplit) -> Column:
    """The split by how many rows of the entity come after the row; an entity keeps a row to train on, or all of them."""
    entity = Window.partitionBy(by.by)
    place = F.row_number().over(entity.orderBy(F.desc_nulls_last(by.order), F.desc("row_id")))
    left_out = by.test + by.validation
    held = F.when(place <= by.test, "test").when(place <= left_out, "validation").otherwise("train")
    is_enough = F.col(by.by).isNotNull() & (F.count(F.lit(1)).over(entity) > left_out)
    return F.when(is_enough, held).otherwise("train")


def _by_position(rows: DataFrame, by: PositionSplit) -> DataFrame:
    """The split by where the middle of the row stands in its file, whose rows are counted and never brought together."""
    last = rows.groupBy("_file").agg(F.max("_line").alias("_last"))
    middle = (F.col("_line") - 0.5) * F.lit(_PLACES) / F.col("_last")
    return (
        rows.join(F.broadcast(last), on="_file", how="inner")
        .withColumn("_split", _cut(middle, by.shares))
        .drop("_last")
    )


def _by_shares(entity: Column, shares: dict[str, float], seed: int, purpose: str) -> Column:
    return _cut(_place(entity, seed, purpose), shares)


def _cut(place: Column, shares: dict[str, float]) -> Column:
    """The split of a place in [0, 2^20), of which each takes its share in turn."""
    names = list(shares)
    upper, chosen = 0.0, F.lit(names[-1])
    bounds = []
    for name in names[:-1]:
        upper += shares[name]
        bounds.append((name, round(upper * _PLACES)))
    for name, bound in reversed(bounds):
        chosen = F.when(place < F.lit(bound), F.lit(name)).otherwise(chosen)
    return chosen
