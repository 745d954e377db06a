"""LIBSVM's sparse text: `label index:value index:value ...`, indices from 1 and rising.

Format: https://www.csie.ntu.edu.tw/~cjlin/libsvm/
"""

from collections.abc import Sequence
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.config.data import Table, sparse_size
from pipelines.sources.lines import numbered_lines
from pipelines.sources.reasons import first_reason, not_finite


def read(spark: SparkSession, source: Table, files: Sequence[Path], root: Path) -> DataFrame:
    """Rows of `files`: the label, and a struct of `ids` (from 0) and `values`."""
    (label, _), (vector, dtype) = source.columns.items()
    size = sparse_size(dtype)
    tokens = F.filter(F.split(F.split("_raw", "#")[0], r"\s+"), lambda token: token != "")
    pairs = F.transform(
        F.slice("_tokens", F.lit(2), F.greatest(F.size("_tokens") - 1, F.lit(0))), lambda t: F.split(t, ":")
    )
    rows = (
        numbered_lines(spark, files, root)
        .withColumn("_tokens", tokens)
        .where(F.size("_tokens") > 0)
        .withColumn("_pairs", pairs)
        .withColumn(label, F.get("_tokens", F.lit(0)).try_cast("double"))
        .withColumn("_ids", F.transform("_pairs", lambda pair: F.get(pair, F.lit(0)).try_cast("int") - 1))
        .withColumn("_values", F.transform("_pairs", lambda pair: F.get(pair, F.lit(1)).try_cast("double")))
    )
    wrong_number = F.exists("_values", lambda v: v.isNull() | F.isnan(v) | (F.abs(v) == float("inf")))
    wrong_index = F.exists("_ids", lambda i: i.isNull() | (i < 0) | (i >= size))
    falling = F.exists(
        F.sequence(F.lit(1), F.greatest(F.size("_ids") - 1, F.lit(1))),
        lambda at: F.get("_ids", at) <= F.get("_ids", at - 1),
    )
    reasons = [
        F.when(
            F.col(label).isNull(),
            F.concat(F.lit(f"{label}: wanted a number, seen '"), F.get("_tokens", F.lit(0)), F.lit("'")),
        ),
        *not_finite({label: "double"}),
        F.when(F.exists("_pairs", lambda pair: F.size(pair) != 2), F.lit("wanted index:value pairs")),
        F.when(wrong_index, F.lit(f"wanted indices from 1 to {size}")),
        F.when(wrong_number, F.lit("wanted finite values")),
        F.when(falling, F.lit("wanted rising indices")),
    ]
    return rows.select(
        label,
        F.struct(F.col("_ids").alias("ids"), F.col("_values").alias("values")).alias(vector),
        "_file",
        "_line",
        "_raw",
        first_reason(reasons).alias("_reason"),
    )
