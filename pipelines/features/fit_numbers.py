"""Fit the steps of a number: what to ask of one pass over the rows, and what its answers make of each step."""

import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pyspark.sql import Column
from pyspark.sql import functions as F

from pipelines.config.features import Input
from pipelines.config.steps import Step
from pipelines.errors import DataError
from pipelines.features.apply import number, stepped_column
from pipelines.features.fitted import (
    Clip,
    DatePart,
    DaysSince,
    Fill,
    FittedNumber,
    Log1p,
    NumberStep,
    Ratio,
    Scale,
    SignedLog,
    stepped_array,
)
from pipelines.features.split import in_train

QUANTILE_ACCURACY = 10_000
QUARTILES = (0.25, 0.5, 0.75)

Stats = Mapping[str, Any]
Asking = Generator[dict[str, Column], Stats, FittedNumber]


def number_places(group: Input) -> list[FittedNumber]:
    """The numbers of an input, not fitted yet: a column each, or what is made of them."""
    found: list[FittedNumber] = []
    for column in group.columns:
        if group.origin is None:
            found.append(FittedNumber(column=column))
        elif group.origin.age:
            found.append(FittedNumber(column=column, origin=DaysSince(other=group.origin.age.against)))
        elif group.origin.ratio:
            found.append(FittedNumber(column=column, origin=Ratio(other=group.origin.ratio.by)))
        elif group.origin.date:
            waves: tuple[Literal["sin", "cos"] | None, ...] = ("sin", "cos") if group.origin.date.cyclic else (None,)
            found += [
                FittedNumber(column=column, origin=DatePart(part=part, wave=wave))
                for part in group.origin.date.parts
                for wave in waves
            ]
    return found


def fit_number(where: str, place: FittedNumber, group: Input, notes: list[str]) -> Asking:
    """Fit the steps of one column; a generator that gives aggregates and is sent their values, once or twice.

    Statistics are of the values present. What an imputer adds is worked out from them, so that it costs no pass of its
    own; all steps keep the order of values, so that a quantile behind steps is the steps applied to the quantile. Only
    moments behind a clip at quantiles need a second pass.

    Args:
        where: Names the column in messages.
        place: The number, not fitted yet.
        group: The input whose steps it takes.
        notes: Takes what a user should know.

    Raises:
        DataError: No value is present, or some are missing and no imputer is declared.
    """
    value, shares = in_train(number(place.column, place.origin)), _shares(group.steps)
    names = [step.name for step in group.steps]
    before = _known(group.steps[: names.index("standardize")]) if "standardize" in names else None
    seen = dict((yield _statistics(value, names, shares) | (_moments(value, before) if before is not None else {})))
    if not seen["num"]:
        raise DataError(
            f"{where}: wanted numbers, all {seen['missing']:,} training rows are missing; leave the column out"
        )
    quantile = dict(zip(shares, seen.get("quantiles", ()), strict=True))
    fitted: list[NumberStep] = []
    splits: tuple[float, ...] | None = None
    if (fill := _fill(where, group, seen, quantile)) is not None:
        fitted.append(fill)
    for step in group.steps:
        match step.name:
            case "log1p":
                fitted.append(Log1p())
            case "signed_log":
                fitted.append(SignedLog())
            case "clip":
                fitted.append(_clip(step, fitted, quantile))
            case "standardize":
                if before is None:  # they stand behind bounds that were not known
                    seen |= yield _moments(value, [s for s in fitted if not isinstance(s, Fill)])
                fitted.append(_standardized(seen, fitted))
            case "robust_scale":
                low, middle, high = (_at(fitted, quantile[share]) for share in QUARTILES)
                fitted.append(Scale(shift=middle, factor=_inverse(high - low)))
            case "min_max":
                ends = [_at(fitted, seen["min"]), _at(fitted, seen["max"])]
                if seen["missing"]:
                    ends.append(_at(fitted, None))
                fitted.append(Scale(shift=min(ends), factor=_inverse(max(ends) - min(ends))))
            case "bucketize":
                inner = [i / step.options.quantiles for i in range(1, step.options.quantiles or 1)]
                splits = tuple(step.options.splits or sorted({quantile[share] for share in inner}))
    for done in fitted:
        if isinstance(done, Scale) and done.factor == 0.0:
            notes.append(f"{where} is constant ({done.shift:g} after its steps) in the training split: it becomes 0")
    return place.model_copy(update={"steps": tuple(fitted), "splits": splits})


def _statistics(value: Column, names: Sequence[str], shares: Sequence[float]) -> dict[str, Column]:
    """What steps of those names need to know of the values present."""
    wanted = {"num": F.count(value), "missing": F.count(in_train(F.lit(1))) - F.count(value), "mean": F.avg(value)}
    if shares:
        wanted["quantiles"] = F.percentile_approx(value, list(shares), QUANTILE_ACCURACY)
    if "min_max" in names:
        wanted |= {"min": F.min(value), "max": F.max(value)}
    if "impute_most_frequent" in names:
        wanted["mode"] = F.mode(value, True)
    return wanted


def _shares(steps: Sequence[Step]) -> tuple[float, ...]:
    """All quantiles that the steps need."""
    found: set[float] = set()
    for step in steps:
        match step.name:
            case "impute_median":
                found.add(0.5)
            case "robust_scale":
                found |= set(QUARTILES)
            case "clip" if step.options.quantiles:
                found |= set(step.options.quantiles)
            case "bucketize" if step.options.quantiles:
                found |= {i / step.options.quantiles for i in range(1, step.options.quantiles)}
    return tuple(sorted(found))


def _known(steps: Sequence[Step]) -> list[NumberStep] | None:
    """Steps, imputers left out, as far as no pass is needed to know them; else None."""
    found: list[NumberStep] = []
    for step in steps:
        match step.name:
            case "log1p":
                found.append(Log1p())
            case "signed_log":
                found.append(SignedLog())
            case "clip" if step.options.quantiles:
                return None
            case "clip":
                found.append(Clip(low=step.options.low, high=step.options.high))
    return found


def _moments(value: Column, before: Sequence[NumberStep]) -> dict[str, Column]:
    value = stepped_column(before, value)
    return {"step_mean": F.avg(value), "step_variance": F.var_pop(value)}


def _fill(where: str, group: Input, seen: Stats, quantile: Mapping[float, float]) -> Fill | None:
    """What stands for a missing value; without an imputer the mean, for one that is missing only when it is scored."""
    names = {step.name for step in group.steps}
    if "impute_median" in names:
        return Fill(value=quantile[0.5])
    if "impute_most_frequent" in names:
        return Fill(value=seen["mode"])
    if constant := next((step.options for step in group.steps if step.name == "impute_constant"), None):
        return Fill(value=constant.value)
    if "impute_mean" in names:
        return Fill(value=seen["mean"])
    if "bucketize" in names:
        return None
    if group.origin and group.origin.date and group.origin.date.cyclic:
        return Fill(value=0.0)
    if seen["missing"]:
        raise DataError(
            f"{where}: wanted no missing values, seen {seen['missing']:,} in training rows; add impute_median, "
            "impute_mean, impute_most_frequent or impute_constant to its steps"
        )
    return Fill(value=seen["mean"])


def _clip(step: Step, fitted: Sequence[NumberStep], quantile: Mapping[float, float]) -> Clip:
    bounds = step.options.quantiles
    if bounds is None:
        return Clip(low=step.options.low, high=step.options.high)
    low, high = (_at(fitted, quantile[share]) for share in bounds)
    return Clip(low=low, high=high)


def _standardized(seen: Stats, fitted: Sequence[NumberStep]) -> Scale:
    mean, variance = float(seen["step_mean"]), float(seen["step_variance"])
    if seen["missing"]:
        mean, variance = _with_filled(seen["num"], mean, variance, seen["missing"], _at(fitted, None))
    return Scale(shift=mean, factor=_inverse(math.sqrt(variance)))


def _with_filled(num: int, mean: float, variance: float, missing: int, filled: float) -> tuple[float, float]:
    """Mean and population variance of `num` values together with `missing` copies of `filled`.

    The pairwise update of T. F. Chan, G. H. Golub, R. J. LeVeque, 1979.
    """
    total = num + missing
    delta = filled - mean
    return mean + delta * missing / total, (num * variance + delta * delta * num * missing / total) / total


def _at(steps: Sequence[NumberStep], value: float | None) -> float:
    """What the steps make of one value."""
    return float(stepped_array(steps, np.array([np.nan if value is None else value]))[0])


def _inverse(width: float) -> float:
    return 1.0 / width if width > 0 else 0.0
