"""Lines of text files with their numbers, the same on every machine and core count.

Spark cuts files into blocks by size and cores. A first pass counts the lines of each block; a line's number is
the count before its block plus its place in the block.
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F


def relative_path(root: Path) -> Column:
    """`_metadata.file_path`, a URI, as a path relative to `root`."""
    encoded = F.replace(F.col("_metadata.file_path"), F.lit("+"), F.lit("%2B"))
    path = F.regexp_replace(F.url_decode(encoded), "^file:/+", "/")
    return F.substring(path, len(str(root).rstrip("/")) + 2, 1 << 20)


def numbered_lines(spark: SparkSession, files: Sequence[Path], root: Path) -> DataFrame:
    """Lines as `_raw`, with `_file` and `_line`; blank lines are counted but left out."""
    lines = spark.read.text([str(file) for file in files]).select(
        F.col("value").alias("_raw"),
        relative_path(root).alias("_file"),
        F.col("_metadata.file_block_start").alias("_block"),
        F.monotonically_increasing_id().alias("_id"),
    )
    counts = lines.groupBy("_file", "_block").agg(F.count("*").alias("num"), F.min("_id").alias("first")).collect()
    starts: list[tuple[str, int, int]] = []
    for file, blocks in groupby(sorted(counts), key=lambda row: str(row["_file"])):
        before = 0
        for block in blocks:
            starts.append((file, block["_block"], before - block["first"] + 1))
            before += block["num"]
    offsets = spark.createDataFrame(starts, "_file string, _block bigint, offset bigint")
    return (
        lines.join(F.broadcast(offsets), on=["_file", "_block"], how="inner")
        .withColumn("_line", F.col("_id") + F.col("offset"))
        .where(F.trim("_raw") != "")
        .select("_raw", "_file", "_line")
    )
