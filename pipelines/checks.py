"""The constraints of `source.checks` on Spark: those of a row ride in the pass that parses, those of the table follow."""

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from pipelines.config.checks import OF_THE_TABLE, Check, Reference
from pipelines.errors import DataError
from pipelines.lake.contract import Frozen
from pipelines.sources.files import named_files
from pipelines.sources.reasons import first_reason


class Violation(Frozen):
    """What a constraint found.

    Attributes:
        consequence: What the config wants of it: reject, count or fail.
        num: Rows that break it; 1 where the whole table does.
        seen: What was seen, in words.
    """

    name: str
    consequence: str
    num: int
    seen: str

    def __str__(self) -> str:
        return f"{self.name}: {self.seen} ({self.consequence})"


def check_rows(rows: DataFrame, checks: list[Check]) -> tuple[DataFrame, dict[str, Column]]:
    """Give a `_reason` to rows that break a constraint which rejects or fails, and say what counts the violations.

    A row that could not be parsed breaks none; one that breaks several is counted with each, and its reason is the
    first.

    Returns:
        The rows, with further columns of our own, and by constraint the aggregate that counts.

    Raises:
        DataError: A table that is referred to lacks the column.
    """
    counts: dict[str, Column] = {}
    reasons = [F.col("_reason")]
    for check in checks:
        if check.kind in OF_THE_TABLE:
            continue
        for name, column in zip(check.names, check.columns, strict=True):
            dtype = rows.schema[column].dataType.simpleString()
            if check.reference:
                rows = _with_reference(rows, check.reference, column, dtype)
            satisfied, wanted = _satisfied(check, column, dtype)
            flag = f"_broken{len(counts)}"
            rows = rows.withColumn(flag, F.col("_reason").isNull() & ~satisfied)
            counts[name] = F.count_if(flag)
            if check.consequence != "count":
                seen = F.lit("null") if check.not_null else F.col(column).cast("string")
                reasons.append(F.when(F.col(flag), F.concat(F.lit(f"{column}: wanted {wanted}, seen "), seen)))
    return rows.withColumn("_reason", first_reason(reasons)), counts


def _satisfied(check: Check, column: str, dtype: str) -> tuple[Column, str]:
    """Whether a row satisfies a constraint, never null, and what was wanted."""
    value = F.col(column)
    if check.not_null:
        return value.isNotNull(), "a value"
    if check.range:
        bounds = {"at least": check.range.min, "at most": check.range.max}
        wanted = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
        low, high = (_literal(bound, dtype) if bound is not None else value for bound in bounds.values())
        inside = value.between(low, high)
    elif check.set:
        wanted = f"one of {', '.join(str(allowed) for allowed in check.set.values[:10])}"
        inside = value.isin(*check.set.values)
    elif check.regex:
        wanted = f"the form {check.regex.pattern}"
        inside = value.rlike(rf"\A(?:{check.regex.pattern})\z")
    elif check.reference:
        wanted = f"a {check.reference.key} of {check.reference.table}"
        inside = F.col(_reference_name(column)).isNotNull()
    return value.isNull() | inside, wanted


def _literal(bound: Any, dtype: str) -> Column:
    """A bound in Spark's words; dates and timestamps are those of the session's time zone."""
    return F.lit(str(bound)).cast(dtype) if dtype in ("date", "timestamp") else F.lit(bound)


def _reference_name(column: str) -> str:
    return f"_reference_{column}"


def _with_reference(rows: DataFrame, reference: Reference, column: str, dtype: str) -> DataFrame:
    """`rows` with the value of the other table's column that is equal to the row's, or null."""
    files = [str(file) for file in named_files([reference.table], reference.format, key="source.checks: reference")]
    reader = rows.sparkSession.read.option("header", True)
    table = reader.csv(files) if reference.format == "csv" else reader.parquet(*files)
    if reference.key not in table.columns:
        raise DataError(
            f"source.checks: reference of {column}: wanted a column {reference.key!r} in {reference.table}, seen "
            f"{', '.join(table.columns)}"
        )
    name = _reference_name(column)
    known = table.select(F.col(reference.key).try_cast(dtype).alias(name)).distinct()
    return rows.join(known, on=rows[column] == known[name], how="left")


def row_violations(
    checks: list[Check], counted: Mapping[str, int], before: Iterable[Violation]
) -> tuple[Violation, ...]:
    """What the constraints of a row found, in the rows that were counted and in those before that they come to."""
    known = {violation.name: violation.num for violation in before}
    numbers = [(c, name, counted[name] + known.get(name, 0)) for c in checks for name in c.names if name in counted]
    return tuple(
        Violation(name=name, consequence=check.consequence, num=num, seen=f"{num:,} rows")
        for check, name, num in numbers
        if num
    )


def check_table(
    checks: list[Check], parts: Sequence[DataFrame], *, num: int, num_before: int | None
) -> list[Violation]:
    """What the constraints of the table found, but for its age: `parts` are all its rows, `num` of them."""
    found = [_check_unique(parts, check) for check in checks if check.unique]
    found += [_check_row_count(check, num, num_before) for check in checks if check.row_count and num_before]
    return [violation for violation in found if violation]


def check_age(checks: list[Check], newest: Mapping[str, float | None], *, now: float) -> list[Violation]:
    """What `freshness` finds at `now`, of the newest value of each column; all in seconds since 1970."""
    found = []
    for check in checks:
        if check.freshness and not check.freshness.allows(value := newest[check.freshness.column], now=now):
            seen = "no value" if value is None else f"the newest is {(now - value) / 3600:.1f} hours old"
            found.append(_violation(check, f"{seen}, {check.freshness.max_hours:g} are allowed"))
    return found


def refuse(found: Iterable[Violation]) -> None:
    """Fail on what the config wants to fail.

    Raises:
        DataError: A constraint that fails is broken.
    """
    if failing := [str(violation) for violation in found if violation.consequence == "fail"]:
        raise DataError(
            f"ingest: source.checks: {'; '.join(failing)}; the table stays as it is; mend the rows or the constraint"
        )


def _check_unique(parts: Sequence[DataFrame], check: Check) -> Violation | None:
    """Rows alike in the columns, in one aggregation that reads no others; one with a missing value is like no other."""
    names = [F.col(name) for name in check.columns]
    values = reduce(DataFrame.unionAll, [part.select(*names) for part in parts]).dropna()
    twice = values.groupBy(*names).count().where("count > 1")
    num = F.sum(F.col("count") - 1).alias("num")
    found = twice.agg(num, F.max_by(F.struct(*names), "count").alias("most")).first()
    if found is None or not found["num"]:
        return None
    example = ", ".join(f"{name}={found['most'][name]}" for name in check.columns)
    return _violation(check, f"{found['num']:,} rows too many, as {example}", num=found["num"])


def _check_row_count(check: Check, rows: int, before: int) -> Violation | None:
    assert check.row_count
    low, high = check.row_count.min_ratio, check.row_count.max_ratio
    if (low is None or rows >= low * before) and (high is None or rows <= high * before):
        return None
    allowed = " and ".join(f"{word} {b:g}" for word, b in (("at least", low), ("at most", high)) if b is not None)
    return _violation(check, f"{rows:,} rows, {rows / before:.3g} times the {before:,} before, {allowed} allowed")


def _violation(check: Check, seen: str, *, num: int = 1) -> Violation:
    return Violation(name=check.names[0], consequence=check.consequence, num=num, seen=seen)
