"""Why a row does not fit, as one expression."""

from collections.abc import Mapping, Sequence

from pyspark.sql import Column
from pyspark.sql import functions as F


def first_reason(reasons: Sequence[Column]) -> Column:
    """The first reason that is not null, or null."""
    return F.coalesce(*reasons, F.lit(None).cast("string"))


def not_finite(columns: Mapping[str, str]) -> list[Column]:
    """For each float column, a reason where its value is NaN or infinite."""
    return [
        F.when(
            F.isnan(name) | (F.abs(F.col(name)) == float("inf")),
            F.concat(F.lit(f"{name}: wanted a finite number, seen "), F.col(name).cast("string")),
        )
        for name, dtype in columns.items()
        if dtype in ("float", "double")
    ]
