"""Delimited text: one row a line, fields as declared."""

from collections.abc import Sequence
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.config.data import Table
from pipelines.errors import DataError
from pipelines.sources.lines import numbered_lines
from pipelines.sources.reasons import first_reason, not_finite
from pipelines.sources.schema import differences

_CORRUPT = "_corrupt"


def read(spark: SparkSession, source: Table, files: Sequence[Path], root: Path) -> DataFrame:
    """Rows of `files`; one with a wrong number of fields or a field of another type has a reason."""
    options = {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in source.options.items()}
    header = options.pop("header", "false") == "true"
    options |= {"mode": "PERMISSIVE", "columnNameOfCorruptRecord": _CORRUPT}
    lines = numbered_lines(spark, files, root)
    if header:
        _check_headers(lines, list(source.columns), options)
        lines = lines.where(F.col("_line") > 1)

    def parsed(types: dict[str, str]) -> str:
        return ", ".join(f"`{name}` {dtype}" for name, dtype in {**types, _CORRUPT: "string"}.items())

    typed = F.from_csv("_raw", parsed(source.columns), options)
    texts = F.from_csv("_raw", parsed(dict.fromkeys(source.columns, "string")), options)
    wrong_type = [
        F.when(
            F.col(f"_typed.{name}").isNull() & texts[name].isNotNull(),
            F.concat(F.lit(f"{name}: wanted {dtype}, seen '"), texts[name], F.lit("'")),
        )
        for name, dtype in source.columns.items()
    ]
    malformed = F.when(
        F.col(f"_typed.{_CORRUPT}").isNotNull(),
        F.when(
            texts[_CORRUPT].isNotNull(), F.lit(f"wanted {len(source.columns)} fields, seen another number")
        ).otherwise(first_reason([*wrong_type, F.lit("not a row of the declared columns")])),
    )
    return (
        lines.withColumn("_typed", typed)
        .withColumn("_malformed", malformed)
        .select(
            *[F.col(f"_typed.{name}").alias(name) for name in source.columns], "_file", "_line", "_raw", "_malformed"
        )
        .withColumn("_reason", first_reason([F.col("_malformed"), *not_finite(source.columns)]))
        .drop("_malformed")
    )


def _check_headers(lines: DataFrame, wanted: list[str], options: dict[str, str]) -> None:
    """Refuse headers that are not the declared columns; where files disagree, one of each kind is named."""
    places = 2 * len(wanted) + 10  # of which the columns that are too many show themselves
    names = F.from_csv("_raw", ", ".join(f"_{i} string" for i in range(places)), options)
    headers = lines.where(F.col("_line") == 1).select("_file", names.alias("names")).orderBy("_file").collect()
    seen = {row["_file"]: [str(name).strip() for name in row["names"] if name is not None] for row in headers}
    wrong = [file for file, header in seen.items() if header != wanted]
    if not wrong:
        return
    right = next((f" as {file} has them" for file in seen if file not in wrong), "")
    found = differences(dict.fromkeys(wanted, ""), dict.fromkeys(seen[wrong[0]], "")) or ["a column twice"]
    more = f" (and {len(wrong) - 1} more files, as {wrong[1]})" if len(wrong) > 1 else ""
    raise DataError(
        f"{wrong[0]}{more}: header: wanted {', '.join(wanted)}{right}, seen {', '.join(seen[wrong[0]])}: "
        f"{', '.join(found)}; mend the file or source.schema"
    )
