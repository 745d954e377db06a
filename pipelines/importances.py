"""What a fitted MLlib model makes of each feature: importances of trees, coefficients of linear models, by name."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from pyspark.ml import Model

from pipelines.bootstrap import Floats
from pipelines.config.catalog import TREES
from pipelines.features.fitted import (
    BETWEEN,
    MISSING,
    FittedCategory,
    FittedFeatures,
    FittedInput,
    FittedList,
    FittedNumber,
)
from pipelines.lake import Column, Contract

MOST = 1000  # features that are kept, the weightiest first


class Feature(BaseModel):
    """A place of the vector that a model reads, and what it weighs there."""

    model_config = ConfigDict(frozen=True)

    name: str
    weight: float


class Importances(BaseModel):
    """The features of a model by the size of their weight.

    Attributes:
        kind: Share of the impurity that splits on the feature took away, over all trees, 1 together; its coefficient;
            or, of a model with coefficients for each class, their Euclidean norm.
        features: At most `MOST`.
        left_out: How many more there are.
    """

    model_config = ConfigDict(frozen=True)

    kind: str
    features: list[Feature]
    left_out: int


def importances(model: Model, name: str, fitted: FittedFeatures, contract: Contract) -> Importances | None:
    """Of a fitted model; None where its family has no weight of a feature.

    Args:
        model: The model.
        name: Its estimator.
        fitted: Names the values behind ids.
        contract: Of the table that it was fitted on.
    """
    found = _weights(model)
    if found is None:
        return None
    kind, weights = found
    order = np.argsort(-np.abs(weights), kind="stable")[:MOST].tolist()
    kept = set(order)
    names = {place: text for place, text in enumerate(place_names(fitted, contract, estimator=name)) if place in kept}
    features = [Feature(name=names[place], weight=float(weights[place])) for place in order]
    return Importances(kind=kind, features=features, left_out=len(weights) - len(features))


def _weights(model: Any) -> tuple[str, Floats] | None:
    if hasattr(model, "featureImportances"):
        return "importance", model.featureImportances.toArray()
    if hasattr(model, "coefficientMatrix"):
        matrix = model.coefficientMatrix.toArray()
        return (
            ("coefficient", matrix[0]) if len(matrix) == 1 else ("norm of coefficients", np.linalg.norm(matrix, axis=0))
        )
    for name in ("coefficients", "linear"):  # a factorization machine's part without interactions
        if hasattr(model, name):
            return "coefficient", getattr(model, name).toArray()
    return None


def place_names(fitted: FittedFeatures, contract: Contract, *, estimator: str) -> Iterator[str]:
    """A name for each place of the vector that `assemble` makes, as `input.column: value`."""
    inputs = {group.name: group for group in fitted.inputs}
    for column in contract.inputs:
        yield from column_names(column, inputs[column.input], estimator=estimator)


def column_names(column: Column, group: FittedInput, *, estimator: str) -> Iterator[str]:
    """The names of a column's places in that vector."""
    match column.kind:
        case "sparse_weights":
            return
        case "ids":
            yield from _id_names(group, one_hot=estimator not in TREES)
        case "sparse_ids" if isinstance(group.whole, FittedList):
            yield from (f"{group.name}: {value}" for value in values_of(group.whole.category))
        case "sparse_ids":
            yield from (f"{group.name}: {place}" for place in range(column.sizes[0]))
        case _ if column.names:
            yield from (f"{column.name}.{name}" for name in column.names)
        case _:
            yield from (f"{column.name}[{place}]" for place in range(column.width))


def _id_names(group: FittedInput, *, one_hot: bool) -> Iterator[str]:
    for column in group.columns:
        assert isinstance(column, FittedNumber | FittedCategory), "an input of ids"
        name = f"{group.name}.{column.name}"
        yield from (f"{name}: {value}" for value in values_of(column)) if one_hot else (name,)


def values_of(column: FittedNumber | FittedCategory) -> list[str]:
    """What stands behind each id."""
    if isinstance(column, FittedNumber):
        edges = ["-inf", *(f"{split:g}" for split in column.splits or ()), "inf"]
        return [*(f"[{low}, {high})" for low, high in pairwise(edges)), "missing"]
    if column.values is None:
        return [f"id {place}" for place in range(column.num_ids)]  # hashed, or too many to stand here
    texts = [MISSING if value is None else value for value in column.values]
    return ["other", *(text.replace(BETWEEN, " x ").replace(MISSING, "missing") for text in texts)]
