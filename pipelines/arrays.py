"""Arrow columns as numpy arrays of the contract's shapes and back, without a list of rows in between."""

from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import DataError
from pipelines.lake import Column
from pipelines.lake.contract import Dtype

_STORED = {dtype: pa.from_numpy_dtype(dtype) for dtype in get_args(Dtype)}
ARROW_TYPES = {
    "int": pa.int32(),
    "bigint": pa.int64(),
    "float": pa.float32(),
    "double": pa.float64(),
    "string": pa.string(),
    "boolean": pa.bool_(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us", "UTC"),
    "binary": pa.binary(),
}


def arrow_type(dtype: str) -> pa.DataType:
    """The type of a column of `source.schema` in Arrow."""
    if dtype.startswith("array<"):
        return pa.list_(ARROW_TYPES[dtype.removeprefix("array<").removesuffix(">")])
    if dtype.startswith("sparse("):
        return pa.struct([("ids", pa.list_(pa.int64())), ("values", pa.list_(pa.float64()))])
    return ARROW_TYPES[dtype]


def to_array(values: pa.Array | pa.ChunkedArray, column: Column, *, where: str) -> npt.NDArray[Any]:
    """A column as an array of shape (rows, *column.shape).

    Args:
        values: The Arrow column.
        column: What the contract says of it.
        where: Named in errors.

    Raises:
        DataError: It has nulls, another element type, or values of another length than the contract's.
    """
    where = f"{where}: column {column.name!r}"
    array = one_chunk(values)
    if array.null_count:
        raise DataError(f"{where}: wanted no nulls, seen {array.null_count:,}")
    if not column.shape:
        _check_type(array.type, column, where)
        scalars: npt.NDArray[Any] = array.to_numpy(zero_copy_only=False)  # booleans are bits
        return scalars
    if column.dtype == "uint8":
        return _bytes(array, column, where).reshape(len(array), *column.shape)
    _check_type(getattr(array.type, "value_type", None), column, where)
    lengths = pc.min_max(pc.list_value_length(array)).as_py()
    if len(array) and (lengths["min"], lengths["max"]) != (column.width, column.width):
        raise DataError(f"{where}: wanted {column.width} elements a row, seen {lengths['min']} to {lengths['max']}")
    return _elements(array, where).reshape(len(array), *column.shape)


def to_padded(values: pa.Array | pa.ChunkedArray, column: Column, *, where: str) -> npt.NDArray[Any]:
    """Lists of any lengths as an array of shape (rows, longest), padded with zeros."""
    array = one_chunk(values)
    _check_type(getattr(array.type, "value_type", None), column, f"{where}: column {column.name!r}")
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy()
    padded = np.zeros((len(array), max(1, int(lengths.max(initial=0)))), dtype=column.dtype)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = _elements(array, where)
    return padded


def as_column(array: npt.NDArray[Any]) -> pa.Array:
    """An array of shape (rows, ...) as an Arrow column of lists; bytes for uint8."""
    flat, width = np.ascontiguousarray(array).reshape(-1), int(np.prod(array.shape[1:]))
    if array.dtype == np.uint8:
        ends = pa.array(np.arange(len(array) + 1, dtype=np.int32) * width)
        return pa.Array.from_buffers(pa.binary(), len(array), [None, ends.buffers()[1], pa.py_buffer(flat)])
    return pa.ListArray.from_arrays(pa.array(np.arange(len(array) + 1, dtype=np.int32) * width), pa.array(flat))


def one_chunk(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column as one array."""
    if not isinstance(values, pa.ChunkedArray):
        return values
    if values.num_chunks == 1:
        return values.chunk(0)  # combine_chunks would copy it
    array = values.combine_chunks()
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array


def _elements(array: pa.Array, where: str) -> npt.NDArray[Any]:
    flat = array.flatten()
    if flat.null_count:
        raise DataError(f"{where}: wanted no nulls in its lists, seen {flat.null_count:,}")
    elements: npt.NDArray[Any] = flat.to_numpy()
    return elements


def _bytes(array: pa.Array, column: Column, where: str) -> npt.NDArray[np.uint8]:
    if not pa.types.is_binary(array.type):
        raise DataError(f"{where}: wanted binary, seen {array.type}")
    lengths = pc.min_max(pc.binary_length(array)).as_py()
    if len(array) and (lengths["min"], lengths["max"]) != (column.width, column.width):
        raise DataError(f"{where}: wanted {column.width} bytes a row, seen {lengths['min']} to {lengths['max']}")
    if not len(array):
        return np.empty(0, dtype=np.uint8)
    start = array.offset * column.width  # all values have one length, so offsets need not be read
    return np.frombuffer(array.buffers()[2], dtype=np.uint8)[start : start + len(array) * column.width]


def _check_type(seen: pa.DataType | None, column: Column, where: str) -> None:
    if seen != _STORED.get(column.dtype):
        raise DataError(f"{where}: wanted {column.dtype}, seen {seen}")
