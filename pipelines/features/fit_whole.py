"""Fit the inputs that take one column as a whole: images, vectors, sparse vectors, lists and texts."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from pyspark.ml.feature import PCA
from pyspark.ml.functions import array_to_vector
from pyspark.ml.stat import Summarizer
from pyspark.mllib.linalg.distributed import RowMatrix
from pyspark.mllib.util import MLUtils
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from pipelines.assemble import sparse_vectors
from pipelines.config import Config
from pipelines.config.data import sparse_size
from pipelines.config.features import Features, Input
from pipelines.config.steps import Vocabulary
from pipelines.errors import DataError
from pipelines.features.apply import transform
from pipelines.features.fit_categories import fit_category
from pipelines.features.fit_values import Counted
from pipelines.features.fitted import (
    NO_LABEL,
    FittedCategory,
    FittedFeatures,
    FittedImage,
    FittedInput,
    FittedList,
    FittedSparse,
    FittedVector,
    Floats,
    Whole,
)
from pipelines.tables import kept

Stats = Mapping[str, Any]


def whole_aggregates(name: str, config: Config) -> dict[str, Column]:
    """What is asked of all rows: how many do not fit, and for sparse vectors the longest list."""
    group = config.features.inputs[name]
    column = F.col(group.columns[0])
    match group.steps[0].name:
        case "image":
            step = group.steps[0].options
            of_length = F.lit(True) if step.encoded else F.length(column) == math.prod(step.shape)
            return {f"{name}:unfit": F.count_if(column.isNull() | ~of_length)}
        case "vector":
            found = {f"{name}:unfit": F.count_if(~_is_vector(group))}
            return found | ({f"{name}:moments": _moments(group)} if len(group.steps) > 1 else {})
        case "sparse":
            size = sparse_size(config.source.columns[group.columns[0]])
            ids, values = column["ids"], column["values"]
            unfit = column.isNull() | F.exists(ids, lambda i: (i < 0) | (i >= size)) | F.exists(values, _is_hole)
            unfit |= F.size(ids) != F.size(values)
            return {f"{name}:unfit": F.count_if(unfit), f"{name}:width": F.coalesce(F.max(F.size(ids)), F.lit(1))}
    if group.weights:
        lengths = [F.coalesce(F.size(c), F.lit(0)) for c in (group.columns[0], group.weights[0])]
        return {f"{name}:unfit": F.count_if(lengths[0] != lengths[1])}
    return {}


def check_wholes(features: Features, stats: Stats) -> None:
    """Refuse rows that do not fit.

    Raises:
        DataError: There are such rows.
    """
    for name, group in features.inputs.items():
        if unfit := stats.get(f"{name}:unfit"):
            step = (group.list_form or group.steps[0]).model_dump(exclude_unset=True)
            raise DataError(
                f"features.inputs.{name}: column {group.columns[0]!r}: wanted {step}, {unfit:,} rows do not fit; mend "
                "them, or the declared shape"
            )


def fit_whole(
    rows: DataFrame, name: str, config: Config, stats: Stats, counted: Counted, num_rows: int, passes: list[str]
) -> Whole:
    """The input of that name.

    Args:
        rows: Raw rows of all splits.
        name: The input.
        config: The workload.
        stats: What `whole_aggregates` asked for.
        counted: Of all columns.
        num_rows: Training rows.
        passes: Takes what the rows are read for.

    Raises:
        DataError: More values in lists than the driver takes.
    """
    group = config.features.inputs[name]
    source, step = group.columns[0], group.steps[0]
    if step.image:
        image = step.image
        return FittedImage(source=source, shape=tuple(image.shape), scale=image.scale, encoded=image.encoded)
    if step.vector:
        return _fit_vector(rows, group, stats.get(f"{name}:moments"), passes)
    if step.sparse:
        return FittedSparse(source=source, size=sparse_size(config.source.columns[source]))
    if (name, 0) in counted.large:
        raise DataError(
            f"features.inputs.{name}: its lists hold too many values; raise min_count, set max_size, or use hash"
        )
    category = fit_category(config, name, 0, counted, num_rows, [])
    assert isinstance(category, FittedCategory) and group.list_form is not None
    idf = _idf(group, category, counted, name, num_rows) if group.has_idf else ()
    fitted = FittedList(source=source, tokens=step.tokens, category=category, form=group.list_form.options, idf=idf)
    if svd := group.steps[-1].svd:
        passes.append("components")
        fitted = fitted.model_copy(update={"components": _singular_vectors(rows, name, fitted, svd.components)})
    return fitted


def _is_vector(group: Input) -> Column:
    column = F.col(group.columns[0])
    width: int = group.steps[0].options.width
    return column.isNotNull() & (F.size(column) == width) & ~F.exists(column, _is_hole)


def _is_hole(number: Column) -> Column:
    return number.isNull() | F.isnan(number.cast("double"))


def _moments(group: Input) -> Column:
    """Moments of the training rows that fit; Summarizer leaves out what weighs nothing, and fails on nulls."""
    fits, zeros = _is_vector(group), F.array_repeat(F.lit(0.0), group.steps[0].options.width)
    values = F.when(fits, F.transform(group.columns[0], lambda x: x.cast("double"))).otherwise(zeros)
    weight = (fits & (F.col("_split") == "train")).cast("double")
    return Summarizer.metrics("mean", "variance", "min", "max", "count").summary(array_to_vector(values), weight)


def _fit_vector(rows: DataFrame, group: Input, moments: Any, passes: list[str]) -> FittedVector:
    width = group.steps[0].options.width
    fitted = FittedVector(source=group.columns[0], width=width)
    names = [step.name for step in group.steps]
    if "standardize" in names:
        variance = moments["variance"].toArray() * (1 - 1 / moments["count"])  # Spark's is that of a sample
        fitted = _scaled(fitted, moments["mean"].toArray(), np.sqrt(variance))
    elif "min_max" in names:
        low, high = moments["min"].toArray(), moments["max"].toArray()
        fitted = _scaled(fitted, low, high - low)
    if not group.steps[-1].pca:
        return fitted
    passes.append("components")
    values: Column = F.transform(group.columns[0], lambda x: x.cast("double"))
    if not fitted.factor:
        fitted = _scaled(fitted, moments["mean"].toArray(), np.ones(width))
    shift, factor = (F.array(*map(F.lit, numbers)) for numbers in (fitted.shift, fitted.factor))
    values = F.zip_with(F.zip_with(values, shift, lambda a, b: a - b), factor, lambda a, b: a * b)
    train = rows.where(F.col("_split") == "train").select(array_to_vector(values).alias("vector"))
    found = PCA(k=group.steps[-1].pca.components, inputCol="vector", outputCol="_").fit(train)
    return fitted.model_copy(update={"components": tuple(map(tuple, found.pc.toArray().T.tolist()))})


def _singular_vectors(rows: DataFrame, name: str, fitted: FittedList, num: int) -> tuple[tuple[float, ...], ...]:
    """The first right singular vectors of the training rows, each with the sign that makes its largest place positive.

    Raises:
        DataError: The rows do not have so many.
    """
    size = fitted.category.num_ids
    alone = FittedInput(name="bag", kind="sparse", whole=fitted)
    train = rows.where(F.col("_split") == "train")
    bags = transform(train, FittedFeatures(inputs=(alone,), label=NO_LABEL), keep=[])
    ids, weights = F.col("bag_ids"), F.col("bag_weights")
    with kept(sparse_vectors(bags, ids, weights, size=size, name="vector", keep=[])) as vectors:
        matrix = RowMatrix(MLUtils.convertVectorColumnsFromML(vectors, "vector"))
        found = matrix.computeSVD(num).V.toArray().T if num <= size else np.empty((0, size))
    if len(found) < num:
        raise DataError(
            f"features.inputs.{name}: svd: wanted {num} components, the training rows have {len(found)}; take fewer"
        )
    largest = found[np.arange(num), np.abs(found).argmax(axis=1)]
    return tuple(map(tuple, (found * np.sign(largest)[:, None]).tolist()))


def _scaled(fitted: FittedVector, shift: Floats, width: Floats) -> FittedVector:
    factor = np.divide(1.0, width, out=np.zeros_like(width), where=width > 0)
    return fitted.model_copy(update={"shift": tuple(shift.tolist()), "factor": tuple(factor.tolist())})


def _idf(group: Input, category: FittedCategory, counted: Counted, name: str, num_rows: int) -> tuple[float, ...]:
    """log((rows + 1) / (rows with it + 1)) of each id; every row lacks what is out of vocabulary."""
    counts = {count.value: count.num for count in counted.columns[name, 0]}
    if group.reads_values and isinstance(group.reads_values.options, Vocabulary):
        having = [0, *[counts[value] for value in category.values or ()]]
    else:
        having = [counts.get(str(bucket), 0) for bucket in range(category.num_ids)]
    return tuple(math.log((num_rows + 1) / (num + 1)) for num in having)
