"""Fit the transform on the training split: all numeric statistics in one aggregation, all vocabularies in one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from pipelines.config import Config
from pipelines.config.features import Features, Input, Label
from pipelines.errors import DataError
from pipelines.features.fitted import FittedCategory, FittedFeatures, FittedInput, FittedLabel, FittedNumber
from pipelines.lake import LabelSpec

QUANTILE_ACCURACY = 10_000
MAX_VOCABULARY = 1_000_000  # values that fit the driver and a broadcast; beyond, hash
_LABEL = -1  # the label's place among the columns whose values are counted

Stats = Mapping[str, Any]


@dataclass(frozen=True)
class Fit:
    """What the reduce gives.

    Attributes:
        sparse_widths: For each sparse input, the longest list over all splits.
        rows: Rows of each split.
        notes: What a user should know, a line each.
    """

    fitted: FittedFeatures
    sparse_widths: dict[str, int]
    rows: dict[str, int]
    notes: list[str]


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
    stats: dict[str, Any] = rows.agg(*[c.alias(k) for k, c in _aggregates(config).items()]).first().asDict()  # type: ignore[union-attr]
    num_rows = {split: int(stats[f"rows:{split}"]) for split in config.split.names}
    for split, num in num_rows.items():
        if not num:
            raise DataError(f"split: wanted rows in {split}, seen none; change the shares, or ingest more rows")
    _check_whole_columns(features, stats)
    counted = _count_values(rows, features)
    notes: list[str] = []
    fitted = FittedFeatures(
        inputs=tuple(_fit_input(name, group, config, stats, counted, notes) for name, group in features.inputs.items()),
        label=_fit_label(features.label, config.source.columns[features.label.column], stats, counted),
    )
    widths = {n: max(1, int(stats[f"{n}:width"])) for n, group in features.inputs.items() if group.kind == "sparse"}
    return Fit(fitted=fitted, sparse_widths=widths, rows=num_rows, notes=notes)


def _in_train(value: Column) -> Column:
    return F.when(F.col("_split") == "train", value)


def _step(group: Input, name: str) -> Any:
    """The options of the input's step of that name, or None."""
    return next((getattr(step, name) for step in group.steps if step.name == name), None)


def _aggregates(config: Config) -> dict[str, Column]:
    """Every statistic of one pass over the rows."""
    found = {f"rows:{split}": F.count_if(F.col("_split") == split) for split in config.split.names}
    for name, group in config.features.inputs.items():
        whole = next((step for step in group.steps if step.name in ("image", "vector", "sparse")), None)
        if whole is not None:
            found |= _whole_aggregates(name, group, config)
        elif group.steps and group.steps[-1].name in ("vocabulary", "hash"):
            continue
        else:
            for column in group.columns:
                found |= {f"{name}:{column}:{k}": c for k, c in _number_aggregates(column, group).items()}
    label = config.features.label
    if label.kind == "real":
        value = F.col(label.column).cast("double")
        found |= {
            "label:missing": F.count_if(value.isNull()),
            "label:mean": F.avg(_in_train(value)),
            "label:variance": F.var_pop(_in_train(value)),
        }
    return found


def _number_aggregates(column: str, group: Input) -> dict[str, Column]:
    value = _in_train(F.col(column).cast("double"))
    found = {"num": F.count(value), "mean": F.avg(value)}
    bucketize = _step(group, "bucketize")
    if _step(group, "impute_median"):
        found["median"] = F.percentile_approx(value, 0.5, QUANTILE_ACCURACY)
    if bucketize and bucketize.quantiles:
        shares = [i / bucketize.quantiles for i in range(1, bucketize.quantiles)]
        found["quantiles"] = F.percentile_approx(value, shares, QUANTILE_ACCURACY)
    if _step(group, "log1p"):
        value = F.log1p(F.greatest(value, F.when(value.isNotNull(), F.lit(0.0))))
    if _step(group, "standardize"):
        found |= {"scaled_mean": F.avg(value), "scaled_variance": F.var_pop(value)}
    if _step(group, "min_max"):
        found |= {"min": F.min(value), "max": F.max(value)}
    return found


def _whole_aggregates(name: str, group: Input, config: Config) -> dict[str, Column]:
    column = F.col(group.columns[0])
    if image := _step(group, "image"):
        unfit = column.isNull() | (F.length(column) != math.prod(image.shape))
        return {f"{name}:unfit": F.count_if(unfit)}
    if vector := _step(group, "vector"):
        hole = F.exists(column, lambda x: x.isNull() | F.isnan(x.cast("double")))
        return {f"{name}:unfit": F.count_if(column.isNull() | (F.size(column) != vector.width) | hole)}
    size = _sparse_size(config.source.columns[group.columns[0]])
    ids = F.col(f"{group.columns[0]}.ids")
    return {
        f"{name}:unfit": F.count_if(column.isNull() | F.exists(ids, lambda i: (i < 0) | (i >= size))),
        f"{name}:width": F.coalesce(F.max(F.size(ids)), F.lit(1)),
    }


def _sparse_size(dtype: str) -> int:
    return int(dtype.removeprefix("sparse(").removesuffix(")"))


def _check_whole_columns(features: Features, stats: Stats) -> None:
    for name, group in features.inputs.items():
        if unfit := stats.get(f"{name}:unfit"):
            step = group.steps[0]
            raise DataError(
                f"features.inputs.{name}: column {group.columns[0]!r}: wanted {step.model_dump(exclude_unset=True)}, "
                f"{unfit:,} rows do not fit; mend them, or the declared shape"
            )


def _count_values(rows: DataFrame, features: Features) -> dict[int, list[tuple[str | None, int]]]:
    """Counts of the distinct values of every vocabulary column (training rows) and of the label (all rows).

    Most frequent first, ties in the order of the values, so that ids do not depend on the machine.
    """
    columns = [c for group in features.inputs.values() if _step(group, "vocabulary") for c in group.columns]
    label = features.label
    if not columns and label.kind == "real":
        return {}

    def entry(place: int, column: str) -> Column:
        return F.struct(F.lit(place).alias("place"), F.col(column).cast("string").alias("value"))

    of_label = [] if label.kind == "real" else [entry(_LABEL, label.column)]
    in_train = [entry(place, column) for place, column in enumerate(columns)]
    entries = F.when(F.col("_split") == "train", F.array(*of_label, *in_train))
    if of_label:
        entries = entries.otherwise(F.array(*of_label))
    limits = [_step(group, "vocabulary").min_count for group in features.inputs.values() if _step(group, "vocabulary")]
    counted = (
        rows.select(F.explode(entries).alias("entry"))
        .groupBy("entry.place", "entry.value")
        .agg(F.count("*").alias("num"))
        .where((F.col("num") >= min(limits, default=1)) | (F.col("place") == _LABEL))
    )
    found: dict[int, list[tuple[str | None, int]]] = {place: [] for place in range(_LABEL, len(columns))}
    table = counted.select("place", "value", "num").limit(MAX_VOCABULARY * (len(columns) + 1)).toArrow()
    for place, value, num in zip(*(column.to_pylist() for column in table.columns), strict=True):
        found[place].append((value, num))
    for values in found.values():
        values.sort(key=lambda pair: (-pair[1], pair[0] or ""))
    return found


def _fit_input(
    name: str,
    group: Input,
    config: Config,
    stats: Stats,
    counted: dict[int, list[tuple[str | None, int]]],
    notes: list[str],
) -> FittedInput:
    if image := _step(group, "image"):
        return FittedInput(
            name=name, kind="image", source=group.columns[0], shape=tuple(image.shape), scale=image.scale
        )
    if vector := _step(group, "vector"):
        return FittedInput(name=name, kind="dense", source=group.columns[0], shape=(vector.width,))
    if group.kind == "sparse":
        size = _sparse_size(config.source.columns[group.columns[0]])
        return FittedInput(name=name, kind="sparse", source=group.columns[0], size=size)
    if vocabulary := _step(group, "vocabulary"):
        first = _first_place(config.features, name)
        columns: list[FittedNumber | FittedCategory] = []
        for place, column in enumerate(group.columns, start=first):
            values = [value for value, num in counted[place] if num >= vocabulary.min_count][: vocabulary.max_size]
            if len(values) > MAX_VOCABULARY:
                raise DataError(
                    f"features.inputs.{name}: column {column!r}: wanted a vocabulary of at most {MAX_VOCABULARY:,} "
                    "values; raise min_count, set max_size, or use hash"
                )
            columns.append(FittedCategory(column=column, values=tuple(values)))
        return FittedInput(name=name, kind="ids", columns=tuple(columns))
    if hashed := _step(group, "hash"):
        return FittedInput(
            name=name,
            kind="ids",
            columns=tuple(FittedCategory(column=c, buckets=hashed.buckets, seed=config.seed) for c in group.columns),
        )
    numbers = tuple(_fit_number(name, column, group, stats, notes) for column in group.columns)
    return FittedInput(name=name, kind="ids" if _step(group, "bucketize") else "dense", columns=numbers)


def _first_place(features: Features, name: str) -> int:
    """The place of an input's first column among all vocabulary columns."""
    place = 0
    for other, group in features.inputs.items():
        if other == name:
            break
        place += len(group.columns) if _step(group, "vocabulary") else 0
    return place


def _fit_number(name: str, column: str, group: Input, stats: Stats, notes: list[str]) -> FittedNumber:
    def stat(key: str) -> Any:
        return stats[f"{name}:{column}:{key}"]

    num, missing = int(stat("num")), int(stats["rows:train"]) - int(stat("num"))
    where = f"features.inputs.{name}: column {column!r}"
    if not num:
        raise DataError(f"{where}: wanted numbers, all {missing:,} training rows are missing; leave the column out")
    bucketize, log1p = _step(group, "bucketize"), _step(group, "log1p") is not None
    constant = _step(group, "impute_constant")
    fill: float | None = stat("mean")
    if constant:
        fill = constant.value
    elif _step(group, "impute_median"):
        fill = float(stat("median"))
    elif not _step(group, "impute_mean"):
        if missing and not bucketize:
            raise DataError(
                f"{where}: wanted no missing values, seen {missing:,} in training rows; add impute_median, impute_mean "
                "or impute_constant to its steps"
            )
        fill = None if bucketize else fill
    if bucketize:
        return FittedNumber(
            column=column, fill=fill, log1p=log1p, splits=_splits(bucketize, stats, name, column, log1p)
        )
    shift, scale = 0.0, 1.0
    filled = _logged(float(fill or 0.0), log1p)
    if _step(group, "standardize"):
        mean, variance = _with_filled(num, stat("scaled_mean"), stat("scaled_variance"), missing, filled)
        shift, scale = mean, 1.0 / math.sqrt(variance) if variance > 0 else 0.0
    elif _step(group, "min_max"):
        low, high = stat("min"), stat("max")
        if missing:
            low, high = min(low, filled), max(high, filled)
        shift, scale = low, 1.0 / (high - low) if high > low else 0.0
    if scale == 0.0:
        notes.append(f"{where} is constant ({shift:g} after its steps) in the training split: it becomes 0")
    return FittedNumber(column=column, fill=fill, log1p=log1p, shift=shift, scale=scale)


def _splits(bucketize: Any, stats: Stats, name: str, column: str, log1p: bool) -> tuple[float, ...]:
    if bucketize.splits is not None:
        return tuple(bucketize.splits)
    # log1p is monotone, so the quantile of the logarithm is the logarithm of the quantile.
    return tuple(sorted({_logged(float(q), log1p) for q in stats[f"{name}:{column}:quantiles"]}))


def _logged(value: float, log1p: bool) -> float:
    return math.log1p(max(value, 0.0)) if log1p else value


def _with_filled(num: int, mean: float, variance: float, missing: int, filled: float) -> tuple[float, float]:
    """Mean and population variance of `num` values together with `missing` copies of `filled`.

    The pairwise update of T. F. Chan, G. H. Golub, R. J. LeVeque, 1979.
    """
    total = num + missing
    delta = filled - mean
    return mean + delta * missing / total, (num * variance + delta * delta * num * missing / total) / total


def _fit_label(label: Label, dtype: str, stats: Stats, counted: dict[int, list[tuple[str | None, int]]]) -> FittedLabel:
    where = f"features.label: column {label.column!r}"
    if label.kind == "real":
        if stats["label:missing"]:
            raise DataError(f"{where}: wanted a number in every row, seen {stats['label:missing']:,} missing")
        std = math.sqrt(stats["label:variance"])
        spec = LabelSpec(kind="real", column=label.column, mean=stats["label:mean"], std=std if std > 0 else 1.0)
        return FittedLabel(spec=spec)
    seen = dict(counted[_LABEL])

    def texts(values: Sequence[str | int | float]) -> tuple[str, ...]:
        return tuple(_text(value, dtype) for value in values)

    positive, negative = texts(label.positive), texts(label.negative)
    if label.kind == "binary":
        allowed = {*positive, *negative} if negative else {value for value in seen if value is not None}
        spec = LabelSpec(kind="binary", column=label.column, classes=("0", "1"))
    else:
        classes = texts(label.classes) or tuple(sorted((v for v in seen if v is not None), key=_natural))
        allowed, spec = set(classes), LabelSpec(kind="multiclass", column=label.column, classes=classes)
    outside = {value: num for value, num in seen.items() if value not in allowed}
    if outside:
        shown = ", ".join(f"{value!r} ({num:,} rows)" for value, num in list(outside.items())[:3])
        raise DataError(f"{where}: wanted one of {', '.join(sorted(allowed)[:20])}, seen {shown}; mend rows or classes")
    return FittedLabel(spec=spec, positive=positive, negative=negative)


def _text(value: str | int | float, dtype: str) -> str:
    """A class value of the config as Spark's cast of the column to string writes it."""
    return str(float(value)) if dtype in ("float", "double") else str(value)


def _natural(value: str) -> tuple[float, str]:
    """Sorts numbers by size and before words."""
    try:
        return float(value), value
    except ValueError:
        return math.inf, value
