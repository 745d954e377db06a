"""Apply a FittedFeatures on Spark: column expressions, and a broadcast join a vocabulary. No Python rows."""

import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from pipelines.features.fitted import FittedCategory, FittedFeatures, FittedInput, FittedLabel, FittedNumber

MISSING = "\x00"  # stands for null where values are compared; no text file holds it


def transform(rows: DataFrame, fitted: FittedFeatures, *, keep: list[str]) -> DataFrame:
    """Feature columns for raw rows.

    Args:
        rows: With the source columns that the features name.
        fitted: The transform.
        keep: Columns of `rows` to pass through.

    Returns:
        `keep`, then the inputs in order. Sparse inputs are lists of their own lengths (see `pad_sparse`).
    """
    for fitted_input in fitted.inputs:
        for column in fitted_input.columns:
            if isinstance(column, FittedCategory) and column.values is not None:
                rows = _join_ids(rows, fitted_input.name, column)
    columns = [column for fitted_input in fitted.inputs for column in _input_columns(fitted_input)]
    return rows.select(*keep, *columns)


def with_label(rows: DataFrame, label: FittedLabel) -> DataFrame:
    """`rows` with a column `label`: a class index, a number, or null where the value is outside the label's set."""
    value = F.col(label.spec.column)
    if label.spec.kind == "real":
        return rows.withColumn("label", value.cast("double"))
    text = value.cast("string")
    if label.spec.kind == "binary":
        negative = text.isin(*label.negative) if label.negative else text.isNotNull()
        return rows.withColumn(
            "label", F.when(text.isin(*label.positive), F.lit(1)).when(negative, F.lit(0)).cast("bigint")
        )
    index = F.array_position(F.array(*[F.lit(c) for c in label.spec.classes]), text) - 1
    return rows.withColumn("label", F.when(index >= 0, index).cast("bigint"))


def pad_sparse(rows: DataFrame, widths: dict[str, int]) -> DataFrame:
    """`rows` with the ids and weights of each sparse input padded to its width by zeros."""
    for name, width in widths.items():
        for column, zero in ((f"{name}_ids", F.lit(0).cast("bigint")), (f"{name}_weights", F.lit(0.0).cast("float"))):
            padding = F.array_repeat(zero, F.lit(width) - F.size(column))
            rows = rows.withColumn(column, F.concat(column, padding))
    return rows


def number(column: FittedNumber) -> Column:
    """A number as the float (double precision) that its fitted steps give."""
    value = F.coalesce(F.col(column.column).cast("double"), F.lit(0.0 if column.fill is None else column.fill))
    if column.log1p:
        value = F.log1p(F.greatest(value, F.lit(0.0)))
    return (value - F.lit(column.shift)) * F.lit(column.scale) if (column.shift, column.scale) != (0.0, 1.0) else value


def bucket(column: FittedNumber) -> Column:
    """A number as the index of its bucket."""
    splits = column.splits or ()
    value: Column = F.col(column.column).cast("double")
    if column.fill is not None:
        value = F.coalesce(value, F.lit(column.fill))
    if column.log1p:
        value = F.log1p(F.greatest(value, F.lit(0.0)))
    index = F.lit(0)
    for split in splits:
        index = index + (value >= F.lit(split)).cast("int")
    return F.coalesce(index, F.lit(len(splits) + 1))


def _id_name(name: str, column: str) -> str:
    return f"_id_{name}_{column}"


def _join_ids(rows: DataFrame, name: str, column: FittedCategory) -> DataFrame:
    key, number_name = f"_key_{name}_{column.column}", _id_name(name, column.column)
    values = [MISSING if value is None else value for value in column.values or ()]
    ids = {key: pa.array(values, pa.string()), number_name: pa.array(range(1, len(values) + 1), pa.int64())}
    table = rows.sparkSession.createDataFrame(pa.table(ids))
    keyed = rows.withColumn(key, F.coalesce(F.col(column.column).cast("string"), F.lit(MISSING)))
    return keyed.join(F.broadcast(table), on=key, how="left").drop(key)


def _category(name: str, column: FittedCategory) -> Column:
    if column.values is not None:
        return F.coalesce(F.col(_id_name(name, column.column)), F.lit(0))
    text = F.coalesce(F.col(column.column).cast("string"), F.lit(MISSING))
    return F.pmod(F.xxhash64(text, F.lit(column.seed)), F.lit(column.buckets))


def _input_columns(fitted: FittedInput) -> list[Column]:
    if fitted.kind == "image":
        return [F.col(fitted.source).alias(fitted.name)]
    if fitted.kind == "sparse":
        ids = F.transform(F.col(f"{fitted.source}.ids"), lambda i: i.cast("bigint"))
        weights = F.transform(F.col(f"{fitted.source}.values"), lambda v: v.cast("float"))
        return [ids.alias(f"{fitted.name}_ids"), weights.alias(f"{fitted.name}_weights")]
    if fitted.kind == "ids":
        ids = F.array(
            *[
                (bucket(column) if isinstance(column, FittedNumber) else _category(fitted.name, column)).cast("bigint")
                for column in fitted.columns
            ]
        )
        return [ids.alias(fitted.name)]
    if fitted.source:
        return [F.transform(F.col(fitted.source), lambda x: x.cast("float")).alias(fitted.name)]
    numbers = [number(column).cast("float") for column in fitted.columns if isinstance(column, FittedNumber)]
    return [F.array(*numbers).alias(fitted.name)]
