"""The features of conf/ctr.yaml by other means: a Spark job written by hand for that one table, and MLlib's stock stages.

Both start from the ingested table and write a table a split, laid out as the stage lays them out; neither keeps a
contract, a Snapshot, a receipt or an MLflow run.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyspark.ml import Pipeline
from pyspark.ml.feature import Imputer, SQLTransformer, StandardScaler, StringIndexer, VectorAssembler
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from pipelines.config import Config

SPLITS = ("train", "test", "validation")


def by_hand(spark: SparkSession, config: Config, raw: Path, target: Path) -> None:
    """The same rows as the stage's, in three readings: statistics, values, and the write of each split."""
    inputs = config.features.inputs
    numbers, missing, ids = (inputs[name].columns for name in ("numbers", "missing", "ids"))
    rows = _split(spark.read.format("delta").load(str(raw)), config)
    train = rows.where("_split = 'train'")
    logged = {name: F.log1p(_at_least_0(name)) for name in numbers}
    asked = [F.count("*").alias("rows")]
    for name, column in logged.items():
        of = {"num": F.count(name), "mean": F.avg(name), "logged": F.avg(column), "square": F.avg(column * column)}
        asked += [value.alias(f"{what} {name}") for what, value in of.items()]
    stats = train.agg(*asked).first()
    assert stats is not None
    dense = []
    for name, column in logged.items():
        num, present = stats["rows"], stats[f"num {name}"]
        fill = math.log1p(max(stats[f"mean {name}"], 0.0))
        mean = (present * stats[f"logged {name}"] + (num - present) * fill) / num
        square = (present * stats[f"square {name}"] + (num - present) * fill**2) / num
        scaled = (F.coalesce(column, F.lit(fill)) - mean) / math.sqrt(square - mean**2)
        dense.append(scaled.cast("float"))

    min_count = config.features.inputs["ids"].steps[0].options.min_count
    entries = F.array(*[F.struct(F.lit(i).alias("place"), F.col(c).alias("value")) for i, c in enumerate(ids)])
    counts = train.select(F.explode(entries).alias("e")).groupBy("e.place", "e.value").count()
    rank = F.row_number().over(Window.partitionBy("place").orderBy(F.desc("count"), F.coalesce("value", F.lit(""))))
    vocabulary = counts.where(F.col("count") >= min_count).withColumn("rank", rank).cache()
    for i, name in enumerate(ids):
        of_one = vocabulary.where(F.col("place") == i)
        of_one = of_one.select(F.col("value").alias(f"v{i}"), F.col("rank").alias(f"id{i}"))
        rows = rows.join(F.broadcast(of_one), F.col(name).eqNullSafe(F.col(f"v{i}")), how="left").drop(f"v{i}")
    found = rows.select(
        "_split",
        "row_id",
        F.array(*dense).alias("numbers"),
        F.array(*[F.col(name).isNull().cast("float") for name in missing]).alias("missing"),
        F.array(*[F.coalesce(f"id{i}", F.lit(0)).cast("bigint") for i in range(len(ids))]).alias("ids"),
        F.col("clicked").cast("bigint").alias("label"),
    )
    row_bytes = 8 + 4 * (len(numbers) + len(missing)) + 8 * len(ids) + 8
    _write(found, stats["rows"] * row_bytes, target, config)
    vocabulary.unpersist()


def by_mllib(spark: SparkSession, config: Config, raw: Path, target: Path) -> None:
    """The same information by Imputer, VectorAssembler, StandardScaler and StringIndexer; its ids take every value."""
    inputs = config.features.inputs
    numbers, missing, ids = (inputs[name].columns for name in ("numbers", "missing", "ids"))
    rows = _split(spark.read.format("delta").load(str(raw)), config)
    rows = rows.withColumns({f"absent_{name}": F.col(name).isNull().cast("double") for name in missing})
    rows = rows.withColumns({name: _at_least_0(name) for name in numbers})
    filled, logged = [f"filled_{name}" for name in numbers], [f"logged_{name}" for name in numbers]
    indexed = [f"id_{name}" for name in ids]
    logs = ", ".join(f"log1p({a}) AS {b}" for a, b in zip(filled, logged, strict=True))
    stages: list[Any] = [
        Imputer(inputCols=numbers, outputCols=filled, strategy="mean"),
        SQLTransformer(statement=f"SELECT *, {logs} FROM __THIS__"),
        VectorAssembler(inputCols=logged, outputCol="logged"),
        StandardScaler(inputCol="logged", outputCol="numbers", withMean=True, withStd=True),
        StringIndexer(inputCols=ids, outputCols=indexed, handleInvalid="keep"),
        VectorAssembler(inputCols=[f"absent_{name}" for name in missing], outputCol="missing"),
        VectorAssembler(inputCols=indexed, outputCol="ids"),
    ]
    train = rows.where("_split = 'train'")
    found = Pipeline(stages=stages).fit(train).transform(rows)
    label = F.col("clicked").cast("bigint").alias("label")
    found = found.select("_split", "row_id", "numbers", "missing", "ids", label)
    row_bytes = 8 * (1 + len(numbers) + len(missing) + len(ids) + 1)
    _write(found, train.count() * row_bytes, target, config)


def differing(ours: DataFrame, theirs: DataFrame) -> int:
    """Rows of one table without an equal row in the other; floats may differ in their last places."""
    names = ("numbers", "missing", "ids", "label")
    theirs = theirs.select("row_id", *[F.col(name).alias(f"their_{name}") for name in names])
    both = ours.join(theirs, on="row_id", how="full")
    far = F.exists(F.zip_with("numbers", "their_numbers", lambda a, b: F.abs(a - b)), lambda d: d > 1e-5)
    equal = [F.col(name) == F.col(f"their_{name}") for name in names[1:]]
    same = equal[0] & equal[1] & equal[2] & ~far
    return both.where(~F.coalesce(same, F.lit(False))).count()


PEERS: dict[str, Callable[[SparkSession, Config, Path, Path], None]] = {"by_hand": by_hand, "by_mllib": by_mllib}


def _at_least_0(name: str) -> Column:
    """A value below 0 as 0; a missing one stays missing, as it would not by `greatest`."""
    return F.when(F.col(name) < 0, 0.0).otherwise(F.col(name).cast("double"))


def _split(rows: DataFrame, config: Config) -> DataFrame:
    assert config.split.validation is not None
    place = F.pmod(F.xxhash64("row_id", F.lit(f"validation:{config.seed}")), F.lit(1 << 20))
    is_moved = (F.col("_split") == "train") & (place < round(config.split.validation.share * (1 << 20)))
    return rows.withColumn("_split", F.when(is_moved, "validation").otherwise(F.col("_split")))


def _write(rows: DataFrame, train_bytes: float, target: Path, config: Config) -> None:
    shares: dict[str, float] = {"train": 1.0, "test": 0.125, "validation": 0.11}  # of the training split's size
    for split in SPLITS:
        files = math.ceil(train_bytes * shares[split] / (config.features.layout.shard_mb * 1e6))
        part = rows.where(F.col("_split") == split).drop("_split").repartition(files, _hashed("file", config))
        part = part.sortWithinPartitions(_hashed("order", config))
        part.write.format("delta").option("compression", "lz4_raw").mode("overwrite").save(str(target / split))


def _hashed(purpose: str, config: Config) -> Column:
    return F.xxhash64("row_id", F.lit(f"{purpose}:{config.seed}"))
