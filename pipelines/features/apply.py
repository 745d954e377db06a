"""Apply a FittedFeatures on Spark: column expressions, and a join a vocabulary, broadcast where it is small."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from pipelines.arrays import as_column
from pipelines.config.features import Label
from pipelines.features.fitted import (
    BETWEEN,
    DAY_MICROS,
    MISSING,
    Clip,
    DatePart,
    DaysSince,
    Fill,
    FittedCategory,
    FittedColumn,
    FittedEncoding,
    FittedFeatures,
    FittedImage,
    FittedIndicator,
    FittedInput,
    FittedLabel,
    FittedList,
    FittedNumber,
    FittedSparse,
    FittedVector,
    Log1p,
    NumberStep,
    Ratio,
    Scale,
    SignedLog,
    Whole,
)
from pipelines.lake import LabelSpec

if TYPE_CHECKING:
    from pipelines.features.apply_arrow import ArrowFeatures

HEAD_VALUES = 10_000  # of stored values, those that are broadcast


def transform(
    rows: DataFrame, fitted: FittedFeatures, *, keep: list[str], fitted_on: Column | None = None
) -> DataFrame:
    """Feature columns for raw rows.

    Args:
        rows: With the source columns that the features name.
        fitted: The transform.
        keep: Columns of `rows` to pass through.
        fitted_on: Says of a row, which has its `row_id`, whether the transform was fitted on it: target encoding
            then leaves out its fold. None of them by default.

    Returns:
        `keep`, then the inputs in order. Sparse inputs are lists of their own lengths (see `pad_sparse`).
    """
    rows = _with_batches(rows, fitted)
    for fitted_input in fitted.inputs:
        for place, column in enumerate(fitted_input.columns):
            if isinstance(column, FittedEncoding) or (isinstance(column, FittedCategory) and column.buckets is None):
                rows = _with_values(rows, _joined_name(fitted_input, place), column, fitted_on)
    columns = [column for fitted_input in fitted.inputs for column in _input_columns(rows, fitted_input)]
    return rows.select(*keep, *columns)


def with_label(rows: DataFrame, label: FittedLabel) -> DataFrame:
    """`rows` with a column `label`: a class index, a number, or null where the value is outside the label's set.

    Of a multilabel label it is a list of 0 and 1, an element a class; of a survival label the time, and 1 where the event
    was seen. Where feature tables have no column of it, it is null.
    """
    if not label.spec.has_column:
        return rows.withColumn("label", F.lit(None).cast("bigint"))
    value = F.col(label.spec.column)
    if label.spec.is_number:
        value = value.cast("double")
        if label.spec.event:
            value = F.array(value, F.col(label.spec.event).cast("double"))
        return rows.withColumn("label", F.when(has_number(label.spec), value))
    classes = F.array(*[F.lit(name) for name in label.spec.classes])
    if label.spec.kind == "multilabel":
        lists = value.cast("array<string>")
        has = F.transform(classes, lambda name: F.array_contains(lists, name).cast("tinyint"))
        return rows.withColumn("label", F.when(F.size(F.array_except(lists, classes)) == 0, has))
    text = value.cast("string")
    if label.spec.kind == "binary":
        negative = text.isin(*label.negative) if label.negative else text.isNotNull()
        return rows.withColumn(
            "label", F.when(text.isin(*label.positive), F.lit(1)).when(negative, F.lit(0)).cast("bigint")
        )
    index = F.array_position(classes, text) - 1
    return rows.withColumn("label", F.when(index >= 0, index).cast("bigint"))


def has_number(label: Label | LabelSpec) -> Column:
    """Whether a row has a label that is a number of its kind."""
    value = F.col(label.column).cast("double")
    found = value.isNotNull()
    if label.kind == "count":
        found = (value >= 0) & (value % 1 == 0)  # of NaN and infinity the rest is NaN
    if label.event:
        found = (value > 0) & (value < math.inf) & F.col(label.event).cast("double").isin(0.0, 1.0)
    return F.coalesce(found, F.lit(False))


def pad_sparse(rows: DataFrame, widths: dict[str, int]) -> DataFrame:
    """`rows` with the ids and weights of each sparse input padded to its width by zeros."""
    for name, width in widths.items():
        for column, zero in ((f"{name}_ids", F.lit(0).cast("bigint")), (f"{name}_weights", F.lit(0.0).cast("float"))):
            padding = F.array_repeat(zero, F.lit(width) - F.size(column))
            rows = rows.withColumn(column, F.concat(column, padding))
    return rows


def number(column: str, origin: DatePart | DaysSince | Ratio | None = None) -> Column:
    """A number in double precision, or that of a date or of two columns; null where it is missing or NaN."""
    match origin:
        case DatePart(part=part, wave=wave):
            value = _PARTS[part](F.col(column)).cast("double")
            if wave is None:
                return value
            angle = value * F.lit(2 * math.pi / origin.period)
            return F.sin(angle) if wave == "sin" else F.cos(angle)
        case DaysSince(other=other):
            micros = [F.unix_micros(F.col(name).cast("timestamp")) for name in (column, other)]
            return (micros[0] - micros[1]).cast("double") / F.lit(DAY_MICROS)
        case Ratio(other=other):
            quotient = F.try_divide(number(column), number(other))
            return F.nanvl(quotient, F.lit(None).cast("double"))
        case None:
            return F.nanvl(F.col(column).cast("double"), F.lit(None).cast("double"))


_PARTS: dict[str, Callable[[Column], Column]] = {
    "year": F.year,
    "quarter": F.quarter,
    "month": F.month,
    "week": F.weekofyear,
    "day": F.dayofmonth,
    "day_of_week": lambda date: F.weekday(date) + 1,
    "day_of_year": F.dayofyear,
    "hour": F.hour,
    "minute": F.minute,
}


def stepped_column(steps: Sequence[NumberStep], value: Column) -> Column:
    """What the steps make of a number; null stays null until it is filled."""
    for step in steps:
        match step:
            case Fill():
                value = F.coalesce(value, F.lit(step.value))
            case Log1p():
                value = F.log1p(F.when(value < 0, F.lit(0.0)).otherwise(value))
            case SignedLog():
                value = F.signum(value) * F.log1p(F.abs(value))
            case Clip():
                if step.low is not None:
                    value = F.when(value < step.low, F.lit(step.low)).otherwise(value)
                if step.high is not None:
                    value = F.when(value > step.high, F.lit(step.high)).otherwise(value)
            case Scale():
                value = (value - F.lit(step.shift)) * F.lit(step.factor)
    return value


def category_text(columns: Sequence[str]) -> Column:
    """A value as it is counted: its text, null where it is missing; several columns as one text."""
    if len(columns) == 1:
        return F.col(columns[0]).cast("string")
    texts = [F.coalesce(F.col(column).cast("string"), F.lit(MISSING)) for column in columns]
    return F.concat_ws(BETWEEN, *texts)


def fold(folds: int, seed: int) -> Column:
    """The fold of a row, by a hash of its `row_id`."""
    return F.pmod(F.xxhash64("row_id", F.lit(f"fold:{seed}")), F.lit(folds)).cast("int")


def bucket(text: Column, seed: int, buckets: int) -> Column:
    """The hash bucket of a value, `MISSING` where it is null."""
    return F.pmod(F.xxhash64(F.coalesce(text, F.lit(MISSING)), F.lit(seed)), F.lit(buckets))


def _is_missing(rows: DataFrame, column: str) -> Column:
    is_float = rows.schema[column].dataType.simpleString() in ("float", "double")
    return (number(column) if is_float else F.col(column)).isNull()


def _bucket(column: FittedNumber) -> Column:
    splits = column.splits or ()
    value = stepped_column(column.steps, number(column.column, column.origin))
    index = F.lit(0)
    for split in splits:
        index = index + (value >= F.lit(split)).cast("int")
    return F.when(value.isNull(), F.lit(len(splits) + 1)).otherwise(index)


def _joined_name(fitted_input: FittedInput, place: int) -> str:
    return f"_joined_{fitted_input.name}_{place}"


def _key(column: FittedCategory | FittedEncoding) -> Column:
    columns = (column.column,) if isinstance(column.column, str) else column.column
    return F.coalesce(category_text(columns), F.lit(MISSING))


def _with_values(
    rows: DataFrame, name: str, column: FittedCategory | FittedEncoding, fitted_on: Column | None
) -> DataFrame:
    """`rows` with what the fitted values give, null for a category that has none."""
    by_fold = isinstance(column, FittedEncoding) and bool(column.fold_others) and fitted_on is not None
    key = f"_key{name}"
    rows = rows.withColumn(key, _key(column))
    rows = (_join_stored if column.stored else _join_inline)(rows, key, name, column, by_fold=by_fold).drop(key)
    if isinstance(column, FittedCategory):
        return rows
    if not by_fold or fitted_on is None:
        return rows.withColumn(name, F.coalesce(name, F.lit(column.other)))
    others = [*column.fold_others, column.other]  # the last is that of rows of no fold
    place = F.when(fitted_on, fold(len(column.fold_others), column.seed)).otherwise(len(column.fold_others))
    return rows.withColumn(name, F.coalesce(F.get(name, place), F.get(F.array(*map(F.lit, others)), place)))


def _join_inline(
    rows: DataFrame, key: str, name: str, column: FittedCategory | FittedEncoding, *, by_fold: bool
) -> DataFrame:
    values = [MISSING if value is None else value for value in column.values or ()]
    given: pa.Array
    if isinstance(column, FittedCategory):
        given = pa.array(range(1, len(values) + 1), pa.int64())
    elif by_fold:
        given = pa.array([list(row) for row in zip(*column.folds, column.numbers, strict=True)], pa.list_(pa.float64()))
    else:
        given = pa.array(column.numbers, pa.float64())
    table = rows.sparkSession.createDataFrame(pa.table({key: pa.array(values, pa.string()), name: given}))
    return rows.join(F.broadcast(table), on=key, how="left")


def _join_stored(
    rows: DataFrame, key: str, name: str, column: FittedCategory | FittedEncoding, *, by_fold: bool
) -> DataFrame:
    """The most frequent values are broadcast, so that none of them makes one task of the shuffle behind it long.

    The rows that found theirs are dealt to all tasks of the shuffle by a number of their own.
    """
    assert column.stored is not None
    table = rows.sparkSession.read.parquet(*column.stored.paths())
    given = F.col("id") if isinstance(column, FittedCategory) else F.col("number")
    if by_fold:
        given = F.concat("folds", F.array("number"))
    is_head = F.col("id") <= HEAD_VALUES
    head = table.where(is_head).select(F.col("value").alias(key), given.alias(name))
    tail = table.where(~is_head).select(
        F.xxhash64("value").alias(f"{key}_spread"), F.col("value").alias(f"{key}_tail"), given.alias(f"{name}_tail")
    )
    rows = rows.join(F.broadcast(head), on=key, how="left")
    looked_for = F.col(name).isNull()
    rows = rows.withColumns(
        {
            f"{key}_spread": F.when(looked_for, F.xxhash64(key)).otherwise(F.monotonically_increasing_id()),
            f"{key}_tail": F.when(looked_for, F.col(key)),
        }
    )
    rows = rows.join(tail, on=[f"{key}_spread", f"{key}_tail"], how="left").drop(f"{key}_spread", f"{key}_tail")
    return rows.withColumn(name, F.coalesce(name, f"{name}_tail")).drop(f"{name}_tail")


def _category(column: FittedCategory, joined: str) -> Column:
    if column.buckets is None:
        return F.coalesce(F.col(joined), F.lit(0))
    return bucket(_key(column), column.seed, column.buckets)


def _input_columns(rows: DataFrame, fitted: FittedInput) -> list[Column]:
    match fitted.whole:
        case None:
            dtype = "bigint" if fitted.kind == "ids" else "float"
            places = [_place(rows, c, _joined_name(fitted, at)).cast(dtype) for at, c in enumerate(fitted.columns)]
            return [F.array(*places).alias(fitted.name)]
        case whole if in_batches(whole):
            return [F.col(_batch_name(name)).alias(name) for name in _whole_names(fitted)]
        case FittedSparse(source=source):
            ids = F.transform(F.col(f"{source}.ids"), lambda i: i.cast("bigint"))
            weights = F.transform(F.col(f"{source}.values"), lambda v: v.cast("float"))
            return [column.alias(name) for column, name in zip((ids, weights), _whole_names(fitted), strict=True)]
        case FittedVector(source=source):
            return [F.transform(F.col(source), lambda x: x.cast("float")).alias(fitted.name)]
        case whole:
            return [F.col(whole.source).alias(fitted.name)]


def in_batches(whole: Whole) -> bool:
    """Whether no column expression makes the input, but numpy does, in Arrow batches."""
    match whole:
        case FittedImage(encoded=encoded):
            return encoded
        case FittedVector(factor=factor, components=components):
            return bool(factor or components)
        case _:
            return isinstance(whole, FittedList)


def _whole_names(fitted: FittedInput) -> list[str]:
    return [f"{fitted.name}_ids", f"{fitted.name}_weights"] if fitted.kind == "sparse" else [fitted.name]


def _batch_name(name: str) -> str:
    return f"_batch_{name}"


def _with_batches(rows: DataFrame, fitted: FittedFeatures) -> DataFrame:
    """`rows` with the columns of the inputs that numpy makes."""
    made = [group for group in fitted.inputs if group.whole and in_batches(group.whole)]
    if not made:
        return rows
    floats, ids = T.ArrayType(T.FloatType()), T.ArrayType(T.LongType())
    types: dict[str, list[T.DataType]] = {"dense": [floats], "image": [T.BinaryType()], "sequence": [ids]}
    types["sparse"] = [ids, floats]
    added = [
        T.StructField(_batch_name(name), dtype)
        for group in made
        for name, dtype in zip(_whole_names(group), types[group.kind], strict=True)
    ]
    alone = fitted.model_copy(update={"inputs": tuple(made)})
    return rows.mapInArrow(_Batches(alone), T.StructType([*rows.schema.fields, *added]))


class _Batches:
    """Runs on Spark's Python workers; makes the lookups once a process."""

    _made: ClassVar[dict[str, "ArrowFeatures"]] = {}

    def __init__(self, fitted: FittedFeatures) -> None:
        self.fitted, self.digest = fitted, fitted.digest

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from pipelines.features.apply_arrow import ArrowFeatures

        if self.digest not in self._made:
            self._made.clear()
            self._made[self.digest] = ArrowFeatures(self.fitted)
        features = self._made[self.digest]
        for batch in batches:
            arrays = features(batch)
            columns = [*batch.columns, *map(as_column, arrays.values())]
            yield pa.RecordBatch.from_arrays(columns, [*batch.schema.names, *map(_batch_name, arrays)])


def _place(rows: DataFrame, column: FittedColumn, joined: str) -> Column:
    """The value of one place of an input."""
    match column:
        case FittedNumber(splits=None):
            return stepped_column(column.steps, number(column.column, column.origin))
        case FittedNumber():
            return _bucket(column)
        case FittedIndicator():
            return _is_missing(rows, column.missing)
        case FittedEncoding():
            return F.col(joined)
        case FittedCategory():
            return _category(column, joined)
