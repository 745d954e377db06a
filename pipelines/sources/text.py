"""Plain text: a line is a row of one column, or with the option `block_chars` so many characters of the file are.

Lines end in \\n, \\r\\n or \\r; blank ones are no rows, as in every text format. A block's new lines are characters of it.
"""

from collections.abc import Sequence
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.config.data import Table
from pipelines.sources.blocks import numbered_blocks
from pipelines.sources.lines import numbered_lines
from pipelines.sources.reasons import first_reason


def read(spark: SparkSession, source: Table, files: Sequence[Path], root: Path) -> DataFrame:
    """Rows of `files`, each as it stands there; one that is not UTF-8, or a block in which nothing follows, has a reason."""
    (column,) = source.columns
    reasons = [F.when(~F.is_valid_utf8("_raw"), F.lit(f"{column}: wanted UTF-8, seen other bytes"))]
    if chars := source.options.get("block_chars"):
        rows = numbered_blocks(spark, files, root, chars=int(chars))
        reasons.append(F.when(F.char_length("_raw") < 2, F.lit(f"{column}: wanted two characters or more, seen one")))
    else:
        rows = numbered_lines(spark, files, root)
    raw = F.make_valid_utf8("_raw")
    return rows.select(raw.alias(column), "_file", "_line", raw.alias("_raw"), first_reason(reasons).alias("_reason"))
