"""Fit the transform on the training split: all numeric statistics in one aggregation, all vocabularies in one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from pipelines.config import Config
from pipelines.config.features import NUMBERS, Input, Label
from pipelines.errors import DataError
from pipelines.features.apply import has_number
from pipelines.features.fit_categories import fit_category
from pipelines.features.fit_numbers import Asking, fit_number, number_places
from pipelines.features.fit_values import Counted, class_texts, counted_values, list_column, with_tokens
from pipelines.features.fit_whole import check_wholes, fit_whole, whole_aggregates
from pipelines.features.fitted import (
    NO_LABEL,
    FittedCategory,
    FittedColumn,
    FittedFeatures,
    FittedIndicator,
    FittedInput,
    FittedLabel,
    FittedList,
    FittedNumber,
)
from pipelines.features.split import in_train
from pipelines.lake import LabelSpec, Recommended
from pipelines.lake.contract import UNKNOWN

Stats = Mapping[str, Any]


@dataclass(frozen=True)
class Fit:
    """What the reduce gives.

    Attributes:
        sparse_widths: For each sparse input, the longest list over all splits.
        rows: Rows of each split.
        notes: What a user should know, a line each.
        passes: What the rows were read for, a name a time.
        is_unique: See `Counted`.
    """

    fitted: FittedFeatures
    sparse_widths: dict[str, int]
    rows: dict[str, int]
    notes: list[str]
    passes: list[str]
    is_unique: bool | None


def fit(rows: DataFrame, config: Config) -> Fit:
    """Fit the config's features.

    Args:
        rows: Raw rows of all splits with a column `_split`. Statistics are taken where it is `train`; only
            the longest sparse list and the checks look at all rows.
        config: The workload.

    Raises:
        DataError: A split without rows, missing values without an imputer, values that do not fit an input, or
            a label outside its set.
    """
    features = config.features
    notes: list[str] = []
    asking = {
        f"{name}:{place}": fit_number(f"features.inputs.{name}: column {unfit.name!r}", unfit, group, notes)
        for name, group in features.inputs.items()
        if _is_number(group)
        for place, unfit in enumerate(number_places(group))
    }
    asked_of = with_tokens(rows, features) if features.label_kind == "next_token" else rows
    stats, numbers, rounds = _numbers(asked_of, _aggregates(config), asking)
    num_rows = {split: int(stats[f"rows:{split}"]) for split in config.split.names}
    for split, num in num_rows.items():
        if not num:
            raise DataError(f"split: wanted rows in {split}, seen none; change the shares, or ingest more rows")
    check_wholes(features, stats)
    passes = ["statistics"] * rounds
    with counted_values(rows, config) as counted:
        inputs, num_train = [], num_rows["train"]
        for name, group in features.inputs.items():
            if group.whole:
                whole = fit_whole(rows, name, config, stats, counted, num_train, passes)
                inputs.append(FittedInput(name=name, kind=group.kind, whole=whole))
            else:
                inputs.append(_fit_input(name, config, numbers, counted, num_train, notes))
        label = _fit_label(features.label, config.source.columns, stats, counted, inputs)
        passes += ["values"] * (counted.is_unique is not None)
    columns = {name: config.source.ingested[name] for name in features.sources}
    recommended = _recommended(config, inputs, counted, num_train)
    widths = {name: max(1, int(stats[f"{name}:width"])) for name in features.inputs if f"{name}:width" in stats}
    return Fit(
        fitted=FittedFeatures(inputs=tuple(inputs), label=label, columns=columns, recommended=recommended),
        sparse_widths=widths,
        rows=num_rows,
        notes=notes,
        passes=passes,
        is_unique=counted.is_unique,
    )


def _is_number(group: Input) -> bool:
    is_indicator = [step.name for step in group.steps] == ["missing_indicator"]
    return not (group.whole or group.reads_values or is_indicator)


def _numbers(
    rows: DataFrame, aggregates: Mapping[str, Column], asking: Mapping[str, Asking]
) -> tuple[Stats, dict[str, FittedNumber], int]:
    """The values of `aggregates`, each number's fit, and the passes: what all of them ask together is one."""
    fitted: dict[str, FittedNumber] = {}
    first: Stats = {}
    wanted: dict[str, dict[str, Column]] = {"": dict(aggregates)} | {key: next(fit) for key, fit in asking.items()}
    rounds = 0
    while wanted:
        rounds += 1
        named = [column.alias(f"{key}|{stat}") for key, stats in wanted.items() for stat, column in stats.items()]
        row: dict[str, Any] = rows.agg(*named).first().asDict()  # type: ignore[union-attr]
        seen = {key: {stat: row[f"{key}|{stat}"] for stat in stats} for key, stats in wanted.items()}
        first, wanted = seen.pop("", first), {}
        for key, stats in seen.items():
            try:
                wanted[key] = asking[key].send(stats)
            except StopIteration as done:
                fitted[key] = done.value
    return first, fitted, rounds


def _aggregates(config: Config) -> dict[str, Column]:
    """What is asked of the rows beside the statistics of numbers."""
    found = {f"rows:{split}": F.count_if(F.col("_split") == split) for split in config.split.names}
    for name, group in config.features.inputs.items():
        if group.whole:
            found |= whole_aggregates(name, config)
    label = config.features.label
    if label and label.kind == "next_token":
        ((name, group),) = config.features.inputs.items()
        too_few = F.coalesce(F.size(list_column(name, group)), F.lit(0)) < 2
        found |= {
            "label:unfit": F.count_if(too_few),
            "label:example": F.min(F.when(too_few, _shown(label.columns))),
        }
    if label and label.kind in NUMBERS:
        value, fits = F.col(label.column).cast("double"), has_number(label)
        found |= {
            "label:unfit": F.count_if(~fits),
            "label:example": F.min(F.when(~fits, _shown(label.columns))),
            "label:mean": F.avg(in_train(value)),
            "label:variance": F.var_pop(in_train(value)),
            "label:events": F.sum(in_train(F.col(label.event or label.column).cast("double"))),
        }
    return found


def _shown(columns: Sequence[str]) -> Column:
    """The values of a row as text."""
    texts = [F.concat(F.lit(f"{name}="), F.coalesce(F.col(name).cast("string"), F.lit("null"))) for name in columns]
    return F.concat_ws(", ", *texts)


def _fit_input(
    name: str,
    config: Config,
    numbers: Mapping[str, FittedNumber],
    counted: Counted,
    num_rows: int,
    notes: list[str],
) -> FittedInput:
    group = config.features.inputs[name]
    columns: Sequence[FittedColumn]
    if group.reads_values:
        columns = [fit_category(config, name, place, counted, num_rows, notes) for place in range(len(group.sources))]
    elif _is_number(group):
        columns = [numbers[f"{name}:{place}"] for place in range(len(number_places(group)))]
    else:
        columns = [FittedIndicator(missing=column) for column in group.columns]
    return FittedInput(name=name, kind=group.kind, columns=tuple(columns))


def _fit_label(
    label: Label | None, types: Mapping[str, str], stats: Stats, counted: Counted, inputs: Sequence[FittedInput]
) -> FittedLabel:
    if label is None:
        return NO_LABEL
    where = f"features.label: column {label.column!r}"
    if label.kind == "next_token":
        if unfit := stats["label:unfit"]:
            raise DataError(
                f"{where}: wanted two tokens in every row, one that follows another, seen {unfit:,} with fewer, such as "
                f"{stats['label:example']}"
            )
        return FittedLabel(spec=LabelSpec(kind=label.kind, column=label.column, classes=_tokens(inputs[0])))
    if label.kind in NUMBERS:
        return FittedLabel(spec=_number_spec(label, stats, where))
    seen, dtype = counted.label, types[label.column]
    positive, negative = class_texts(label.positive, dtype), class_texts(label.negative, dtype)
    if label.kind == "binary":
        allowed = {*positive, *negative} if negative else {value for value in seen if value is not None}
        classes: tuple[str, ...] = ("0", "1")
    else:
        classes = class_texts(label.classes, dtype) or tuple(sorted((v for v in seen if v is not None), key=_natural))
        allowed = set(classes)
    if outside := [count for value, count in seen.items() if value not in allowed]:
        shown = ", ".join(f"{count.value!r} ({count.num:,} rows)" for count in outside[:3])
        raise DataError(f"{where}: wanted one of {', '.join(sorted(allowed)[:20])}, seen {shown}; mend rows or classes")
    if not classes:
        raise DataError(f"{where}: wanted a class in some row, seen none")
    of_train = {value: int(sum(count.labels)) for value, count in seen.items()}
    if label.kind == "binary":
        num = sum(of_train.get(value, 0) for value in {*positive})
        counts: tuple[int, ...] = (sum(of_train.values()) - num, num)
    else:
        counts = tuple(of_train.get(value, 0) for value in classes)
    spec = LabelSpec(kind=label.kind, column=label.column, classes=classes, counts=counts)
    return FittedLabel(spec=spec, positive=positive, negative=negative)


def _tokens(sequence: FittedInput) -> tuple[str, ...]:
    """What stands behind each id."""
    assert isinstance(sequence.whole, FittedList), "refused unless it is a sequence"
    values = sequence.whole.category.values or ()
    return ("", UNKNOWN, *(UNKNOWN if value is None else value for value in values))


def _number_spec(label: Label, stats: Stats, where: str) -> LabelSpec:
    if unfit := stats["label:unfit"]:
        wanted = {
            "real": "a number",
            "count": "a whole number of at least 0",
            "survival": f"a time above 0, and 0 or 1 of {label.event!r},",
        }[label.kind]
        raise DataError(
            f"{where}: wanted {wanted} in every row, seen {unfit:,} without, such as {stats['label:example']}"
        )
    if label.kind != "real" and not stats["label:events"]:
        raise DataError(
            f"{where}: wanted {'an event' if label.event else 'a count above 0'} in some training row, seen none"
        )
    mean, std = stats["label:mean"], math.sqrt(stats["label:variance"])
    return LabelSpec(kind=label.kind, column=label.column, event=label.event, mean=mean, std=std if std > 0 else 1.0)


def _recommended(config: Config, inputs: Sequence[FittedInput], counted: Counted, num_rows: int) -> Recommended | None:
    """Users and items, with the training rows of each item."""
    if config.recommend is None:
        return None
    user, item = config.recommend.user, config.recommend.item
    category = next(group.columns[0] for group in inputs if group.name == item)
    assert isinstance(category, FittedCategory), "refused unless it is a vocabulary"
    if category.stored:
        raise DataError(
            f"recommend.item: wanted at most 16 MB of values, so that all items are ranked at once, seen "
            f"{category.stored.size:,} values; raise min_count, or set max_size"
        )
    rows = {count.value: count.num for count in counted.columns.get((item, 0), [])}
    counts = [rows[value] for value in category.values or ()]
    return Recommended(user=user, item=item, item_counts=(num_rows - sum(counts), *counts))


def _natural(value: str) -> tuple[float, str]:
    """Sorts numbers by size and before words."""
    try:
        return float(value), value
    except ValueError:
        return math.inf, value
