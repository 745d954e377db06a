"""Raw rows as Python and JSON hold them, as an Arrow table of the types that the source declares."""

import base64
import io
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pipelines.arrays import arrow_type
from pipelines.config.data import sparse_size
from pipelines.errors import DataError, one_line
from pipelines.features.fitted import (
    FittedCategory,
    FittedEncoding,
    FittedFeatures,
    FittedImage,
    FittedList,
    FittedSparse,
    FittedVector,
    Whole,
)

_EXAMPLES: dict[str, Any] = {
    "int": 1,
    "bigint": 1,
    "float": 0.5,
    "double": 0.5,
    "string": "text",
    "boolean": True,
    "date": "2024-01-31",
    "timestamp": "2024-01-31T12:30:00Z",
}


def to_table(rows: pd.DataFrame, columns: Mapping[str, str]) -> pa.Table:
    """Rows with the declared columns; others are left out.

    Whole numbers may have become floats beside missing values, as pandas makes them. Dates and timestamps may be ISO
    8601 text (UTC), bytes base64 text, and a sparse vector a mapping of `ids` and `values`.

    Args:
        rows: Raw rows; None, NaN and NaT are missing values.
        columns: Names and types, as in `source.schema`.

    Raises:
        DataError: A column is missing, or holds a value that is not of its type.
    """
    arrays = []
    for name, dtype in columns.items():
        if name not in rows.columns:
            raise DataError(
                f"wanted a column {name!r} of type {dtype}, seen {', '.join(map(str, rows.columns))}; give null where its "
                "value is missing"
            )
        try:
            arrays.append(_to_array(rows[name], dtype))
        except (ValueError, TypeError, OverflowError) as error:  # Arrow's own errors are of these
            raise DataError(f"column {name!r}: wanted {dtype}, seen {one_line(str(error), limit=160)}") from None
    return pa.table(arrays, names=list(columns))


def _to_array(values: pd.Series, dtype: str) -> pa.Array:
    wanted = arrow_type(dtype)
    if not len(values):
        return pa.array([], wanted)
    if dtype == "binary":
        return pa.array([_bytes(value) for value in values], wanted)
    if dtype not in ("date", "timestamp"):
        array = pa.Array.from_pandas(values, type=wanted)
        return _checked(array, sparse_size(dtype)) if dtype.startswith("sparse(") else array
    array = pa.Array.from_pandas(values)
    if pa.types.is_string(array.type):
        array = pc.utf8_rtrim(array, "Z").cast(pa.timestamp("us"))
    if not (pa.types.is_date(array.type) or pa.types.is_timestamp(array.type) or array.null_count == len(array)):
        raise pa.ArrowTypeError(str(array.type))
    return array.cast(wanted, safe=False)


def _bytes(value: Any) -> bytes | None:
    if isinstance(value, str):
        return base64.b64decode(value.replace("\n", ""), validate=True)  # MLflow's encoder breaks lines
    if isinstance(value, bytes) or value is None:
        return value
    if pd.api.types.is_float(value) and math.isnan(value):
        return None
    raise TypeError(f"a value of type {type(value).__name__}")


def _checked(vectors: pa.Array, size: int) -> pa.Array:
    ids, values = vectors.field("ids"), vectors.field("values")
    if not pc.list_value_length(ids).equals(pc.list_value_length(values)):
        raise ValueError("a vector without as many values as ids")
    bounds = pc.min_max(ids.flatten(), skip_nulls=False).as_py()
    if len(ids.flatten()) and not (bounds["min"] is not None and 0 <= bounds["min"] <= bounds["max"] < size):
        raise ValueError(f"ids from {bounds['min']} to {bounds['max']}")
    return vectors


def example_row(fitted: FittedFeatures) -> dict[str, Any]:
    """A row that the transform takes, made of its vocabularies and the columns' types."""
    row = {name: _example(dtype) for name, dtype in fitted.columns.items()}
    for group in fitted.inputs:
        if group.whole:
            row[group.whole.source] = _whole_example(group.whole, fitted.columns[group.whole.source])
        for column in group.columns:
            known = column.values if isinstance(column, FittedCategory | FittedEncoding) else None
            if known and row.get(column.name) == _EXAMPLES["string"]:
                row[column.name] = known[0] or known[-1]
    return row


def _example(dtype: str) -> Any:
    if dtype.startswith("array<"):
        return [_example(dtype.removeprefix("array<").removesuffix(">"))]
    return _EXAMPLES.get(dtype)


def _whole_example(whole: Whole, dtype: str) -> Any:
    match whole:
        case FittedImage(encoded=False):
            return bytes(math.prod(whole.shape))
        case FittedImage():
            file = io.BytesIO()
            Image.new("L", (1, 1)).save(file, "PNG")
            return file.getvalue()
        case FittedVector():
            return [0.0] * whole.width
        case FittedSparse():
            return {"ids": [0], "values": [1.0]}
        case FittedList():
            return _example(dtype)
