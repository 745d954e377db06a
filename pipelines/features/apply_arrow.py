"""Apply a FittedFeatures on Arrow tables, without Spark and its JVM: for serving, and wherever rows are few.

    features = ArrowFeatures(fitted)
    tensors = features(pa.Table.from_pylist([{"age": 39, "workclass": "Private"}]))

The values are those that `apply.transform` gives: integers bit for bit, float32 within one unit in the last place.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import DataError
from pipelines.features.apply_whole import Arrays, Rows, column_of, whole_reader
from pipelines.features.fitted import (
    BETWEEN,
    DAY_MICROS,
    DatePart,
    DaysSince,
    FittedCategory,
    FittedColumn,
    FittedEncoding,
    FittedFeatures,
    FittedIndicator,
    FittedInput,
    FittedNumber,
    Floats,
    Ratio,
    stepped_array,
)
from pipelines.features.lookups import reader_of, text_of


class ArrowFeatures:
    """The transform, its vocabularies ready to be looked up.

    Args:
        fitted: The transform.
    """

    def __init__(self, fitted: FittedFeatures) -> None:
        self.fitted = fitted
        self._readers = [
            whole_reader(group.name, group.whole) if group.whole else _columns_reader(group) for group in fitted.inputs
        ]

    def __call__(self, rows: Rows) -> Arrays:
        """Arrays by the names of the contract's inputs, as its networks take them.

        Args:
            rows: Raw rows, with the source columns that the features name.

        Returns:
            float32 of shape (rows, places) for dense inputs, int64 likewise for ids and sequences, uint8 of shape
            (rows, *image) for images; a sparse input as ids and weights of shape (rows, longest), padded with zeros.

        Raises:
            DataError: A column is missing, or of a type that the transform does not take.
        """
        found: Arrays = {}
        for read in self._readers:
            found |= read(rows)
        return found


Reader = Callable[[Rows], npt.NDArray[Any]]


def _columns_reader(group: FittedInput) -> Callable[[Rows], Arrays]:
    readers = [_reader(column) for column in group.columns]
    dtype = np.int64 if group.kind == "ids" else np.float32

    def read(rows: Rows) -> Arrays:
        array = np.empty((rows.num_rows, len(readers)), dtype=dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            for place, read_place in enumerate(readers):
                array[:, place] = read_place(rows)
        return {group.name: array}

    return read


def _reader(column: FittedColumn) -> Reader:
    """What gives one place of an input, of shape (rows,)."""
    match column:
        case FittedNumber():
            return lambda rows: _number(rows, column)
        case FittedIndicator():
            return lambda rows: pc.is_null(column_of(rows, column.missing), nan_is_null=True).to_numpy(
                zero_copy_only=False
            )
        case FittedCategory() | FittedEncoding():
            look_up = reader_of(column)
            return lambda rows: look_up(_text(rows, column.column))


def _text(rows: Rows, names: str | tuple[str, ...]) -> pa.Array:
    """Values as text; several columns as one text."""
    if isinstance(names, str):
        return text_of(column_of(rows, names), names)
    return pc.binary_join_element_wise(*[_text(rows, name) for name in names], BETWEEN)


def _number(rows: Rows, column: FittedNumber) -> npt.NDArray[Any]:
    values = stepped_array(column.steps, _number_of(rows, column))
    if column.splits is None:
        return values
    buckets = np.searchsorted(np.array(column.splits), values, side="right")
    return np.where(np.isnan(values), len(column.splits) + 1, buckets)


def _plain(rows: Rows, name: str) -> Floats:
    """A column of numbers, NaN where it is missing."""
    array = column_of(rows, name)
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_null(array.type)):
        raise DataError(f"features: column {name!r}: wanted numbers, seen {array.type}")
    if pa.types.is_null(array.type):
        array = array.cast(pa.float64())
    return _float(array)


def _number_of(rows: Rows, column: FittedNumber) -> Floats:
    """A column of numbers, or what is made of dates or two columns; NaN where it is missing."""
    match column.origin:
        case DatePart(part=part, wave=wave):
            values = _float(_PARTS[part](_timestamps(rows, column.column)))
            if wave is None:
                return values
            angle: Floats = values * (2 * math.pi / column.origin.period)
            turned: Floats = np.sin(angle) if wave == "sin" else np.cos(angle)
            return turned
        case DaysSince(other=other):
            micros = [_timestamps(rows, name).cast(pa.int64()) for name in (column.column, other)]
            return _float(pc.subtract(*micros)) / DAY_MICROS
        case Ratio(other=other):
            top, bottom = _plain(rows, column.column), _plain(rows, other)
            with np.errstate(over="ignore", invalid="ignore"):
                return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom != 0)
        case None:
            return _plain(rows, column.column)


def _timestamps(rows: Rows, name: str) -> pa.Array:
    array = column_of(rows, name)
    if not (pa.types.is_date(array.type) or pa.types.is_timestamp(array.type) or pa.types.is_null(array.type)):
        raise DataError(f"features: column {name!r}: wanted dates or timestamps, seen {array.type}")
    return array.cast(pa.timestamp("us"), safe=False)


def _float(array: pa.Array) -> Floats:
    values: Floats = array.to_numpy(zero_copy_only=False).astype(np.float64, copy=False)
    return values


_PARTS: dict[str, Callable[[pa.Array], pa.Array]] = {
    "year": pc.year,
    "quarter": pc.quarter,
    "month": pc.month,
    "week": pc.iso_week,
    "day": pc.day,
    "day_of_week": partial(pc.day_of_week, count_from_zero=False, week_start=1),
    "day_of_year": pc.day_of_year,
    "hour": pc.hour,
    "minute": pc.minute,
}
