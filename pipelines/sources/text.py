"""Plain text: a line is a row of one column. Lines end in \\n, \\r\\n or \\r; blank ones are no rows, as in every text format."""

from collections.abc import Sequence
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.config.data import Table
from pipelines.sources.lines import numbered_lines


def read(spark: SparkSession, source: Table, files: Sequence[Path], root: Path) -> DataFrame:
    """Rows of `files`, each line as it stands there; one that is not UTF-8 has a reason."""
    (column,) = source.columns
    lines = numbered_lines(spark, files, root)
    reason = F.when(~F.is_valid_utf8("_raw"), F.lit(f"{column}: wanted UTF-8, seen other bytes"))
    raw = F.make_valid_utf8("_raw")
    return lines.select(raw.alias(column), "_file", "_line", raw.alias("_raw"), reason.alias("_reason"))
