"""The features stage on 1 M generated rows of 13 numbers and 26 categoricals, against a Spark job written by hand.

    python -m benchmarks.features

Both start from the same Delta table and write the same two tables, in turn, in one session; the hand-written job,
`by_hand` below, keeps no contract, no Snapshot, no receipt and no MLflow run, and the stage's time holds all of these.
"""

import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from benchmarks.report import Figure, at_most, report, use_lake

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

ROWS, ROUNDS = 1_000_000, 2
BOUND = 1.3
MIN_COUNT = 10
SHARD_MB = 16
NUMBERS = [f"n{i}" for i in range(13)]
CATEGORIES = [f"c{i}" for i in range(26)]
DISTINCT = [3, 10, 25, 100, 250, 600, 1_500, 3_000, 5_000, 10_000, 20_000, 50_000, 100_000] * 2


def generate(spark: "SparkSession", path: Path) -> None:
    """Numbers with a long tail, a tenth of them missing; categories with few frequent and many rare values."""
    from pyspark.sql import functions as F

    columns: list[Column] = []
    for i, name in enumerate(NUMBERS):
        value = F.when(F.rand(seed=100 + i) > 0.1, F.floor(F.exp(F.randn(seed=i) * 2)))
        columns.append(value.cast("double").alias(name))
    for i, (name, distinct) in enumerate(zip(CATEGORIES, DISTINCT, strict=True)):
        place = F.floor(F.pow(F.rand(seed=200 + i), 3) * distinct)
        columns.append(F.when(F.rand(seed=300 + i) > 0.02, F.hex(F.xxhash64(place, F.lit(i)))).alias(name))
    rows = spark.range(0, ROWS, numPartitions=8)
    rows = rows.select("id", *columns, (F.rand(seed=400) < 0.25).cast("int").alias("clicked"))
    rows.write.mode("overwrite").parquet(str(path))


def workload(lake: Path) -> Path:
    """The config of the generated rows."""
    schema = {"id": "bigint"} | dict.fromkeys(NUMBERS, "double") | dict.fromkeys(CATEGORIES, "string")
    config: dict[str, Any] = {
        "workload": "clicks",
        "source": {
            "format": "parquet",
            "paths": str(lake / "clicks" / "*.parquet"),
            "schema": schema | {"clicked": "int"},
            "key": ["id"],
        },
        "split": {"hash": {"shares": {"train": 0.8, "test": 0.2}}},
        "features": {
            "label": {"column": "clicked", "kind": "binary", "positive": [1], "negative": [0]},
            "inputs": {
                "dense": {"columns": NUMBERS, "steps": [{"impute_constant": {"value": 0}}, "log1p", "standardize"]},
                "ids": {"columns": CATEGORIES, "steps": [{"vocabulary": {"min_count": MIN_COUNT}}]},
            },
            "layout": {"shard_mb": SHARD_MB},
        },
        "classic": [{"estimator": "LogisticRegression"}],
    }
    path = lake / "clicks.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def by_hand(spark: "SparkSession", raw: Path, target: Path) -> None:
    """The same features as a job for this one table."""
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    rows = spark.read.format("delta").load(str(raw))
    if twice := rows.groupBy("id").count().where("count > 1").limit(1).collect():
        raise ValueError(f"two rows with one key: {twice}")
    in_train = F.pmod(F.xxhash64("row_id", F.lit("split:0")), F.lit(1 << 20)) < round(0.8 * (1 << 20))
    rows = rows.withColumn("train", in_train)
    logged = {name: F.log1p(F.coalesce(F.col(name), F.lit(0.0))) for name in NUMBERS}
    statistics_of = [
        f(column).alias(f"{f.__name__}_{name}") for name, column in logged.items() for f in (F.avg, F.stddev_pop)
    ]
    stats = rows.where("train").agg(*statistics_of).first()
    assert stats is not None
    entries = F.array(*[F.struct(F.lit(i).alias("place"), F.col(c).alias("value")) for i, c in enumerate(CATEGORIES)])
    counts = rows.where("train").select(F.explode(entries).alias("e")).groupBy("e.place", "e.value").count()
    rank = F.row_number().over(Window.partitionBy("place").orderBy(F.desc("count"), F.coalesce("value", F.lit(""))))
    vocabulary = counts.where(F.col("count") >= MIN_COUNT).withColumn("rank", rank).cache()
    for i, name in enumerate(CATEGORIES):
        ids = vocabulary.where(F.col("place") == i).select(F.col("value").alias(f"v{i}"), F.col("rank").alias(f"id{i}"))
        rows = rows.join(F.broadcast(ids), F.col(name).eqNullSafe(F.col(f"v{i}")), how="left").drop(f"v{i}")
    dense = [((logged[n] - stats[f"avg_{n}"]) / stats[f"stddev_pop_{n}"]).cast("float") for n in NUMBERS]
    found = rows.select(
        "train",
        "row_id",
        F.array(*dense).alias("dense"),
        F.array(*[F.coalesce(f"id{i}", F.lit(0)).cast("bigint") for i in range(len(CATEGORIES))]).alias("ids"),
        F.col("clicked").cast("bigint").alias("label"),
    )
    row_bytes = 8 + 4 * len(NUMBERS) + 8 * len(CATEGORIES) + 8
    for split, share, chosen in (("train", 0.8, F.col("train")), ("test", 0.2, ~F.col("train"))):
        files = -(-int(ROWS * share * row_bytes) // (SHARD_MB * 1_000_000))
        part = found.where(chosen).drop("train").repartition(files, F.xxhash64("row_id", F.lit("file:0")))
        part = part.sortWithinPartitions(F.xxhash64("row_id", F.lit("order:0")))
        part.write.format("delta").option("compression", "lz4_raw").mode("overwrite").save(str(target / split))
    vocabulary.unpersist()


def differing(ours: "DataFrame", theirs: "DataFrame") -> int:
    """Rows of one table without an equal row in the other; floats may differ in their last places."""
    from pyspark.sql import functions as F

    theirs = theirs.select("row_id", *[F.col(name).alias(f"their_{name}") for name in ("dense", "ids", "label")])
    both = ours.join(theirs, on="row_id", how="full")
    far = F.exists(F.zip_with("dense", "their_dense", lambda a, b: F.abs(a - b)), lambda d: d > 1e-5)
    same = (F.col("ids") == F.col("their_ids")) & (F.col("label") == F.col("their_label")) & ~far
    return both.where(~F.coalesce(same, F.lit(False))).count()


def main() -> int:
    """Returns the exit code."""
    lake = use_lake("features")
    from pipelines.config import load_config
    from pipelines.lake import receipt_path, table_path
    from pipelines.run import run_stages
    from pipelines.session import get_session, stop_session

    config = load_config(workload(lake))
    spark = get_session(config)
    if not (lake / "clicks" / "_SUCCESS").exists():
        generate(spark, lake / "clicks")
    run_stages(config, ["ingest"])
    raw, hand = table_path("clicks", "raw"), lake / "by_hand"
    ours, theirs = [], []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        by_hand(spark, raw, hand)
        theirs.append(time.perf_counter() - started)
        receipt_path("clicks", "features").unlink(missing_ok=True)
        started = time.perf_counter()
        run_stages(config, ["features"])
        ours.append(time.perf_counter() - started)
    read = spark.read.format("delta")
    different = sum(
        differing(read.load(str(table_path("clicks", f"features/{split}"))), read.load(str(hand / split)))
        for split in ("train", "test")
    )
    stop_session()
    mine, peer = statistics.median(ours[1:]), statistics.median(theirs[1:])
    return report(
        "features",
        [
            Figure("features.headrace", mine, "s"),
            Figure("features.by_hand", peer, "s"),
            at_most("features.ratio", mine / peer, "x", BOUND),
            Figure("features.rows_that_differ", different, "rows", goal="<= 0", met=different == 0),
        ],
    )


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[1])
    sys.exit(main())
