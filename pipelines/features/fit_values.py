"""Fit vocabularies and encodings: the values of all their columns are counted in one pass."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from pipelines.config import Config
from pipelines.config.features import Frequency, Hash, Input, Label, Target, Vocabulary
from pipelines.errors import DataError
from pipelines.features.apply import category_text, fold
from pipelines.features.fitted import FittedCategory, FittedEncoding
from pipelines.lake import ROW_ID

MAX_VOCABULARY = 1_000_000  # values that fit the driver and a broadcast; beyond, hash
_KEY, _LABEL = -2, -1  # the places of the key and the label among the columns whose values are counted


@dataclass(frozen=True, slots=True)
class Count:
    """How often a value was seen: rows, and for target encoding the sum of their labels, each by fold."""

    value: str | None
    rows: list[int]
    labels: list[float]

    @property
    def num(self) -> int:
        """Rows over all folds."""
        return sum(self.rows)


@dataclass(frozen=True)
class Counted:
    """Counts of every column whose values are read, most frequent first, ties in the order of the values.

    Attributes:
        columns: By input and place in it; training rows.
        label: All rows; empty for a real label.
        is_unique: No two rows have one `row_id`, where the source has a key. None: nothing was counted.
    """

    columns: Mapping[tuple[str, int], list[Count]]
    label: Mapping[str | None, int]
    is_unique: bool | None


def count_values(rows: DataFrame, config: Config) -> Counted:
    """Count the values of every column of a vocabulary or an encoding, of the label and of the key, in one pass."""
    features = config.features
    places = [
        (name, place)
        for name, group in features.inputs.items()
        if group.reads_values and not isinstance(group.reads_values.options, Hash)
        for place in range(len(group.sources))
    ]
    label = features.label
    if not places and label.kind == "real":
        return Counted({}, {}, None)

    def entry(number: int, value: Column, part: Column) -> Column:
        return F.struct(F.lit(number).alias("place"), value.alias("value"), part.alias("fold"))

    of_all = [] if label.kind == "real" else [entry(_LABEL, F.col(label.column).cast("string"), F.lit(0))]
    if config.source.key:
        of_all.append(entry(_KEY, F.col(ROW_ID).cast("string"), F.lit(0)))
    of_columns, limits, folds = [], [], {_KEY: 1, _LABEL: 1}
    for number, (name, place) in enumerate(places):
        group = features.inputs[name]
        options = group.reads_values.options  # type: ignore[union-attr]
        is_target = isinstance(options, Target)
        part = fold(options.folds, config.seed) if is_target else F.lit(0)
        folds[number] = options.folds if is_target else 1
        of_columns.append(entry(number, category_text(group.sources[place]), part))
        limits.append(0 if is_target else options.min_count)
    entries = F.when(F.col("_split") == "train", F.array(*of_all, *of_columns))
    if of_all:
        entries = entries.otherwise(F.array(*of_all))
    limit = F.get(F.array(F.lit(2), F.lit(0), *map(F.lit, limits)), F.col("place") - _KEY)
    has_target = any(
        isinstance(group.reads_values.options, Target) for group in features.inputs.values() if group.reads_values
    )
    y = label_value(label, config.source.columns[label.column]) if has_target else F.lit(None).cast("double")
    counted = (
        rows.select(y.alias("y"), F.explode(entries).alias("entry"))
        .groupBy("entry.place", "entry.value", "entry.fold")
        .agg(F.count("*").alias("num"), (F.sum("y") if has_target else F.lit(0.0)).alias("labels"))
        .where(F.col("num") >= limit)
    )
    most = MAX_VOCABULARY * sum(folds.values())
    table = counted.limit(most + 1).toArrow()
    if table.num_rows > most:
        raise DataError(
            f"features: wanted at most {most:,} values to count over all columns, seen more; raise min_count, or use hash"
        )
    found: dict[int, dict[str | None, Count]] = defaultdict(dict)
    for number, value, part, num, labels in zip(*(column.to_pylist() for column in table.columns), strict=True):
        if value not in found[number]:
            found[number][value] = Count(value, [0] * folds[number], [0.0] * folds[number])
        count = found[number][value]
        count.rows[part], count.labels[part] = num, labels
    ordered = {
        at: sorted(found[number].values(), key=lambda c: (-c.num, c.value or "")) for number, at in enumerate(places)
    }
    return Counted(ordered, {value: count.num for value, count in found[_LABEL].items()}, not found[_KEY])


def label_value(label: Label, dtype: str) -> Column:
    """The label as target encoding averages it: 1 for positive, 0 for other classes, or its own value."""
    value = F.col(label.column)
    if label.kind == "real":
        return value.cast("double")
    return value.cast("string").isin(*class_texts(label.positive, dtype)).cast("double")


def class_texts(values: Sequence[str | int | float], dtype: str) -> tuple[str, ...]:
    """Class values of the config as Spark's cast of a column of that type to string writes them."""
    return tuple(str(float(value)) if dtype in ("float", "double") else str(value) for value in values)


def fit_category(
    config: Config, name: str, place: int, counted: Counted, num_rows: int
) -> FittedCategory | FittedEncoding:
    """The vocabulary, hash or encoding of one place of an input.

    Args:
        config: The workload.
        name: The input.
        place: The place in it.
        counted: Of all columns.
        num_rows: Training rows.

    Raises:
        DataError: More values than fit.
    """
    group: Input = config.features.inputs[name]
    options = group.reads_values.options  # type: ignore[union-attr]
    columns = group.sources[place]
    column = columns[0] if len(columns) == 1 else columns
    if isinstance(options, Hash):
        return FittedCategory(column=column, buckets=options.buckets, seed=config.seed)
    counts = counted.columns[name, place]
    kept = [count for count in counts if count.num >= options.min_count]
    if isinstance(options, Vocabulary):
        kept = kept[: options.max_size]
    if len(kept) > MAX_VOCABULARY:
        raise DataError(
            f"features.inputs.{name}: column {' x '.join(columns)!r}: wanted at most {MAX_VOCABULARY:,} values; raise "
            "min_count, set max_size, or use hash"
        )
    values = tuple(count.value for count in kept)
    if isinstance(options, Vocabulary):
        return FittedCategory(column=column, values=values)
    if isinstance(options, Frequency):
        return FittedEncoding(
            column=column, values=values, numbers=tuple(count.num / num_rows for count in kept), other=0.0
        )
    return _target(column, options, counts, kept, config.seed)


def _target(
    column: str | tuple[str, ...], options: Target, counts: list[Count], kept: list[Count], seed: int
) -> FittedEncoding:
    """Means of the label, and those without each fold."""

    def sums(found: list[Count], but: int | None) -> tuple[int, float]:
        """Rows and labels of the counts, without fold `but`."""
        return (
            sum(num for count in found for part, num in enumerate(count.rows) if part != but),
            sum(labels for count in found for part, labels in enumerate(count.labels) if part != but),
        )

    def encoded(but: int | None) -> tuple[tuple[float, ...], float]:
        num, labels = sums(counts, but)
        other = labels / num if num else sums(counts, None)[1] / max(sums(counts, None)[0], 1)
        numbers = []
        for count in kept:
            num, labels = sums([count], but)
            weight = num + options.smoothing
            numbers.append((labels + options.smoothing * other) / weight if num else other)
        return tuple(numbers), other

    numbers, other = encoded(None)
    folds = [encoded(part) for part in range(options.folds)]
    return FittedEncoding(
        column=column,
        values=tuple(count.value for count in kept),
        numbers=numbers,
        other=other,
        folds=tuple(fold_numbers for fold_numbers, _ in folds),
        fold_others=tuple(fold_other for _, fold_other in folds),
        seed=seed,
    )
