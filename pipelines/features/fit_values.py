"""Count the values that vocabularies, encodings, class labels and the key are fitted on, all in one pass.

The counts stay distributed. Columns whose values fit into the fitted transform's JSON come to the driver; those of the
others are ranked and written where they are (see `stored`).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from pipelines.config import Config
from pipelines.config.features import NUMBERS, Features, Input, Label
from pipelines.config.steps import Hash, Target, Tokens
from pipelines.errors import DataError
from pipelines.features.apply import bucket, category_text, fold
from pipelines.features.ragged import tokenized
from pipelines.lake import ROW_ID
from pipelines.session import result_bytes
from pipelines.tables import kept

INLINE_BYTES = 16 << 20  # of the values of all columns together that the fitted transform's JSON holds
CLASSES_BYTES = 1 << 20  # of the values of a class label
_KEY, _LABEL = -2, -1  # the places of the key and the label among the columns whose values are counted

Place = tuple[str, int]  # an input, and the place in it


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
    """Counts of every column whose values are read, in the training rows.

    Attributes:
        columns: Most frequent first, ties in the order of the values; those that fit the driver.
        large: The counts of the others: `value`, `rows` (array<bigint>) and `labels` (array<double>) by fold.
        label: Those of the label in all rows, its `labels` how many of them are training rows; empty for a number.
        is_unique: No two rows have one `row_id`, where the source has a key. None: nothing was counted.
    """

    columns: Mapping[Place, list[Count]] = field(default_factory=dict)
    large: Mapping[Place, DataFrame] = field(default_factory=dict)
    label: Mapping[str | None, Count] = field(default_factory=dict)
    is_unique: bool | None = None


@contextmanager
def counted_values(rows: DataFrame, config: Config) -> Iterator[Counted]:
    """Count the values of every column of a vocabulary or an encoding, of the label and of the key, in one pass.

    `Counted.large` can be read inside the body.
    """
    features = config.features
    places = [
        (name, place)
        for name, group in features.inputs.items()
        if group.reads_values and (not isinstance(group.reads_values.options, Hash) or group.has_idf)
        for place in range(len(group.sources))
    ]
    if not places and features.label_kind in (*NUMBERS, "none"):
        yield Counted()
        return
    with kept(_counts(rows, config, places)) as counts:
        size = F.sum(F.coalesce(F.octet_length("value"), F.lit(0)) + 8).alias("size")
        sizes = {row["place"]: int(row["size"]) for row in counts.groupBy("place").agg(size).collect()}
        is_unique = sizes.pop(_KEY, None) is None
        if features.label and sizes.get(_LABEL, 0) > CLASSES_BYTES:
            raise DataError(
                f"features.label: column {features.label.column!r}: wanted classes, seen more values than any network has "
                "outputs; use kind real, or another column"
            )
        inline = _fitting(sizes, min(INLINE_BYTES, result_bytes(rows.sparkSession) // 2))
        found = _collected(counts.where(F.col("place").isin(inline)))
        large = {places[number]: number for number in sizes if number not in inline}
        yield Counted(
            columns={at: found[number] for number, at in enumerate(places) if at not in large},
            large={at: counts.where(F.col("place") == number).drop("place") for at, number in large.items()},
            label={count.value: count for count in found[_LABEL]},
            is_unique=is_unique,
        )


def _fitting(sizes: Mapping[int, int], limit: int) -> list[int]:
    """The label, and the smallest of the other places that together hold at most so many bytes."""
    found, taken = [_LABEL], 0
    for place, size in sorted(sizes.items(), key=lambda pair: pair[1]):
        taken += 0 if place == _LABEL else size
        if taken <= limit:
            found.append(place)
    return found


def _counts(rows: DataFrame, config: Config, places: Sequence[Place]) -> DataFrame:
    """Rows and sums of labels by place and value, arrays by fold, without values that are too rare to be asked for."""
    features, label = config.features, config.features.label

    def entry(number: int, value: Column, part: Column) -> Column:
        return F.struct(F.lit(number).alias("place"), value.alias("value"), part.alias("fold"))

    def entry_of(number: int) -> Callable[[Column], Column]:
        return lambda value: entry(number, value, F.lit(0))

    of_all, of_label = [], []
    if label and label.kind == "multilabel":  # of a missing list the value is missing
        lists = F.coalesce(F.col(label.column).cast("array<string>"), F.array(F.lit(None).cast("string")))
        of_label.append(F.transform(F.array_distinct(lists), entry_of(_LABEL)))
    elif label and label.kind not in (*NUMBERS, "next_token"):
        of_all.append(entry(_LABEL, F.col(label.column).cast("string"), F.lit(0)))
    if config.source.key:
        of_all.append(entry(_KEY, F.col(ROW_ID).cast("string"), F.lit(0)))
    rows = with_tokens(rows, features)
    of_columns, of_lists, least, folds = [], [], [2, 0], [1, 1]  # a key is looked for where it stands twice
    for number, (name, place) in enumerate(places):
        group = features.inputs[name]
        options = group.reads_values.options  # type: ignore[union-attr]
        part = fold(options.folds, config.seed) if isinstance(options, Target) else F.lit(0)
        if group.list_form:
            of_lists.append(F.transform(_distinct(name, group, config.seed), entry_of(number)))
        else:
            of_columns.append(entry(number, category_text(group.sources[place]), part))
        folds.append(options.folds if isinstance(options, Target) else 1)
        least.append(0 if isinstance(options, Target | Hash) else options.min_count)
    singles = [F.array(*of_all, *of_columns)] if of_all or of_columns else []
    entries = F.when(F.col("_split") == "train", F.concat(*singles, *of_label, *of_lists))
    if of_all or of_label:
        entries = entries.otherwise(F.concat(*([F.array(*of_all)] if of_all else []), *of_label))

    def of_place(numbers: Sequence[int]) -> Column:
        return F.get(F.array(*map(F.lit, numbers)), F.col("place") - _KEY)

    y = label_value(label, config.source.columns[label.column]) if label and max(folds) > 1 else F.lit(0.0)
    in_train = (F.col("_split") == "train").cast("double")
    summed = F.when(F.col("entry.place") == _LABEL, F.col("in_train")).otherwise(F.col("y"))
    counted = (
        rows.select(y.alias("y"), in_train.alias("in_train"), F.explode(entries).alias("entry"))
        .groupBy("entry.place", "entry.value", "entry.fold")
        .agg(F.count("*").alias("num"), F.sum(summed).alias("sum"))
    )
    if max(folds) == 1:
        kept = counted.where(F.col("num") >= of_place(least))
        return kept.select("place", "value", F.array("num").alias("rows"), F.array("sum").alias("labels"))
    of_fold = F.map_from_entries(F.collect_list(F.struct("fold", F.struct("num", "sum"))))
    by_fold = counted.groupBy("place", "value").agg(of_fold.alias("seen"), F.sum("num").alias("num"))
    numbers = F.sequence(F.lit(0), of_place(folds) - 1)
    nothing = F.struct(F.lit(0).cast("bigint").alias("num"), F.lit(0.0).alias("sum"))
    seen = F.transform(numbers, lambda part: F.coalesce(F.try_element_at("seen", part), nothing))
    kept = by_fold.where(F.col("num") >= of_place(least)).withColumn("seen", seen)
    return kept.select("place", "value", F.col("seen.num").alias("rows"), F.col("seen.sum").alias("labels"))


def list_column(name: str, group: Input) -> Column:
    """The lists of an input, of rows `with_tokens`."""
    return F.col(_tokens_name(name)) if group.steps[0].tokens else F.col(group.columns[0]).cast("array<string>")


def _distinct(name: str, group: Input, seed: int) -> Column:
    """What a row's list holds, each once: values, or buckets as text."""
    column = F.coalesce(list_column(name, group), F.array().cast("array<string>"))
    if group.reads_values and isinstance(hashed := group.reads_values.options, Hash):
        column = F.transform(column, lambda text: bucket(text, seed, hashed.buckets).cast("string"))
    return F.array_distinct(column)


def _tokens_name(name: str) -> str:
    return f"_tokens_{name}"


def with_tokens(rows: DataFrame, features: Features) -> DataFrame:
    """`rows` with the tokens of texts."""
    wanted = {name: group for name, group in features.inputs.items() if group.steps and group.steps[0].tokens}
    if not wanted:
        return rows
    added = [T.StructField(_tokens_name(name), T.ArrayType(T.StringType())) for name in wanted]
    texts = {_tokens_name(name): (group.columns[0], group.steps[0].options) for name, group in wanted.items()}
    return rows.mapInArrow(partial(_tokenized, texts), T.StructType([*rows.schema.fields, *added]))


def _tokenized(wanted: Mapping[str, tuple[str, Tokens]], batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        lists = [tokenized(batch.column(source), tokens).lists() for source, tokens in wanted.values()]
        yield pa.RecordBatch.from_arrays([*batch.columns, *lists], [*batch.schema.names, *wanted])


def _collected(counts: DataFrame) -> dict[int, list[Count]]:
    """Counts by place, most frequent first, ties in the order of the values."""
    found: dict[int, list[Count]] = defaultdict(list)
    table = counts.select("place", "value", "rows", "labels").toArrow()
    for place, *count in zip(*(column.to_pylist() for column in table.columns), strict=True):
        found[place].append(Count(*count))
    for several in found.values():
        several.sort(key=lambda count: (-count.num, count.value or "", count.value is not None))
    return found


def label_value(label: Label, dtype: str) -> Column:
    """The label as target encoding averages it: 1 for positive, 0 for other classes, or its own value."""
    value = F.col(label.column)
    if label.kind in NUMBERS:
        return value.cast("double")
    return value.cast("string").isin(*class_texts(label.positive, dtype)).cast("double")


def class_texts(values: Sequence[str | int | float], dtype: str) -> tuple[str, ...]:
    """Class values of the config as Spark's cast of a column of that type to string writes them."""
    return tuple(str(float(value)) if dtype in ("float", "double") else str(value) for value in values)
