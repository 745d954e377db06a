"""Apply a FittedFeatures on Arrow tables, without Spark and its JVM: for serving, and wherever rows are few.

    features = ArrowFeatures(fitted)
    tensors = features(pa.Table.from_pylist([{"age": 39, "workclass": "Private"}]))

The values are those that `apply.transform` gives: integers bit for bit, float32 within one unit in the last place.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from pipelines.arrays import one_chunk, to_array, to_padded
from pipelines.errors import DataError
from pipelines.features.fitted import (
    BETWEEN,
    DAY_MICROS,
    MISSING,
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
    Stored,
    stepped_array,
)
from pipelines.lake import Column

_FEW = 512  # rows for which a dictionary is faster than a hash table that Arrow builds anew for each call
_HASHED_AT_ONCE = 1 << 16
_SPARK_SEED = 42  # of its xxhash64

Ids = npt.NDArray[np.int64]
Rows: TypeAlias = pa.Table | pa.RecordBatch


class ArrowFeatures:
    """The transform, its vocabularies ready to be looked up.

    Args:
        fitted: The transform.
    """

    def __init__(self, fitted: FittedFeatures) -> None:
        self.fitted = fitted
        self._places = {
            group.name: [_reader(column) for column in group.columns] for group in fitted.inputs if group.columns
        }

    def __call__(self, rows: Rows) -> dict[str, npt.NDArray[Any]]:
        """Arrays by the names of the contract's inputs, as its networks take them.

        Args:
            rows: Raw rows, with the source columns that the features name.

        Returns:
            float32 of shape (rows, places) for dense inputs, int64 likewise for ids, uint8 of shape (rows, *image) for
            images; a sparse input as ids and weights of shape (rows, longest), padded with zeros.

        Raises:
            DataError: A column is missing, or of a type that the transform does not take.
        """
        found: dict[str, npt.NDArray[Any]] = {}
        for group in self.fitted.inputs:
            if group.columns:
                dtype = np.int64 if group.kind == "ids" else np.float32
                array = np.empty((rows.num_rows, len(group.columns)), dtype=dtype)
                with np.errstate(over="ignore", invalid="ignore"):
                    for place, read in enumerate(self._places[group.name]):
                        array[:, place] = read(rows)
                found[group.name] = array
            else:
                found |= _whole(rows, group)
        return found


Reader = Callable[[Rows], npt.NDArray[Any]]


def _reader(column: FittedColumn) -> Reader:
    """What gives one place of an input, of shape (rows,)."""
    match column:
        case FittedNumber():
            return lambda rows: _number(rows, column)
        case FittedIndicator():
            return lambda rows: pc.is_null(_column(rows, column.missing), nan_is_null=True).to_numpy(
                zero_copy_only=False
            )
        case FittedCategory(buckets=int()):
            return lambda rows: _hashed(_text(rows, column.column), column)
        case FittedCategory(stored=Stored() as stored):
            table = _stored_table(stored, "id")
            return _looking_up(column, _StoredLookup(table), [*table.column("id").to_numpy(), 0])
        case FittedCategory():
            values = column.values or ()
            return _looking_up(column, _Lookup(values), [*range(1, len(values) + 1), 0])
        case FittedEncoding(stored=Stored() as stored):
            table = _stored_table(stored, "number")
            return _looking_up(column, _StoredLookup(table), [*table.column("number").to_numpy(), column.other])
        case FittedEncoding():
            return _looking_up(column, _Lookup(column.values), [*column.numbers, column.other])


def _looking_up(
    column: FittedCategory | FittedEncoding, places: Callable[[pa.Array], Ids], given: Sequence[Any]
) -> Reader:
    """What is given for the places of values, the last for those that have none."""
    array = np.array(given)
    return lambda rows: array[places(_text(rows, column.column))]


def _stored_table(stored: Stored, given: str) -> pa.Table:
    return pa.concat_tables([pq.read_table(path, columns=["value", given]) for path in stored.paths()])


class _Lookup:
    """Places of texts among values, -1 for those that are not there."""

    def __init__(self, values: Sequence[str | None]) -> None:
        texts = [MISSING if value is None else value for value in values]
        self._values = pa.array(texts, pa.string())
        self._places = {text: place for place, text in enumerate(texts)}

    def __call__(self, texts: pa.Array) -> Ids:
        if len(texts) < _FEW:
            return np.array([self._places.get(text, -1) for text in texts.to_pylist()], dtype=np.int64)
        places = pc.fill_null(pc.index_in(texts, value_set=self._values), -1)
        found: Ids = places.to_numpy().astype(np.int64)
        return found


class _StoredLookup:
    """The same for millions of values: a sorted array of their hashes, and a look at the text that is found there."""

    def __init__(self, table: pa.Table) -> None:
        self._values = one_chunk(table.column("value"))
        hashes = _hashes(self._values)
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]
        runs = np.unique(self._sorted, return_counts=True)[1]
        self._longest = int(runs.max(initial=0))  # 1, unless two values have one hash

    def __call__(self, texts: pa.Array) -> Ids:
        encoded = texts.dictionary_encode()
        unique = encoded.dictionary
        first = np.searchsorted(self._sorted, _hashes(unique))
        found = np.full(len(unique), -1, dtype=np.int64)
        for further in range(self._longest):
            places = self._order[np.minimum(first + further, len(self._order) - 1)]
            same = pc.equal(self._values.take(pa.array(places)), unique).to_numpy(zero_copy_only=False)
            found = np.where(same, places, found)
        taken: Ids = found[encoded.indices.to_numpy()]
        return taken


def _hashes(texts: pa.Array) -> npt.NDArray[np.uint64]:
    digest, encoded = xxhash.xxh64_intdigest, texts.cast(pa.binary())
    parts = (encoded.slice(start, _HASHED_AT_ONCE).to_pylist() for start in range(0, len(encoded), _HASHED_AT_ONCE))
    return np.fromiter((digest(text) for part in parts for text in part), np.uint64, len(encoded))


def _column(rows: Rows, name: str) -> pa.Array:
    if name not in rows.schema.names:
        raise DataError(f"features: wanted a column {name!r}, seen {', '.join(rows.schema.names)}")
    return one_chunk(rows.column(name))


def _number(rows: Rows, column: FittedNumber) -> npt.NDArray[Any]:
    values = stepped_array(column.steps, _of_date(rows, column) if column.of_date else _plain(rows, column))
    if column.splits is None:
        return values
    buckets = np.searchsorted(np.array(column.splits), values, side="right")
    return np.where(np.isnan(values), len(column.splits) + 1, buckets)


def _plain(rows: Rows, column: FittedNumber) -> Floats:
    """A column of numbers, NaN where it is missing."""
    array = _column(rows, column.column)
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_null(array.type)):
        raise DataError(f"features: column {column.column!r}: wanted numbers, seen {array.type}")
    if pa.types.is_null(array.type):
        array = array.cast(pa.float64())
    return _float(array)


def _of_date(rows: Rows, column: FittedNumber) -> Floats:
    """A number made of dates, NaN where one is missing."""
    match column.of_date:
        case DatePart(part=part, wave=wave):
            values = _float(_PARTS[part](_timestamps(rows, column.column)))
            if wave is None:
                return values
            angle: Floats = values * (2 * math.pi / column.of_date.period)
            turned: Floats = np.sin(angle) if wave == "sin" else np.cos(angle)
            return turned
        case DaysSince(other=other):
            micros = [_timestamps(rows, name).cast(pa.int64()) for name in (column.column, other)]
            return _float(pc.subtract(*micros)) / DAY_MICROS
    raise AssertionError(column.of_date)


def _timestamps(rows: Rows, name: str) -> pa.Array:
    array = _column(rows, name)
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


def _text(rows: Rows, names: str | tuple[str, ...]) -> pa.Array:
    """Values as Spark casts them to text, `MISSING` for null; several columns as one text."""
    if not isinstance(names, str):
        return pc.binary_join_element_wise(*[_text(rows, name) for name in names], BETWEEN)
    array = _column(rows, names)
    if pa.types.is_floating(array.type):
        raise DataError(f"features: column {names!r}: wanted text, whole numbers, booleans or dates, seen {array.type}")
    return pc.fill_null(array if pa.types.is_string(array.type) else array.cast(pa.string()), MISSING)


def _hashed(texts: pa.Array, column: FittedCategory) -> Ids:
    """Spark's `pmod(xxhash64(text, seed), buckets)`: the first hash is the second one's seed."""
    encoded = texts.dictionary_encode()
    digest = xxhash.xxh64_intdigest
    firsts = [digest(text, _SPARK_SEED) for text in encoded.dictionary.cast(pa.binary()).to_pylist()]
    width = 4 if -(2**31) <= column.seed < 2**31 else 8  # Spark reads the seed as int, or else as bigint
    seed = column.seed.to_bytes(width, "little", signed=True)
    assert column.buckets is not None
    signed = np.array([digest(seed, first) for first in firsts], dtype=np.uint64).view(np.int64)
    found: Ids = np.mod(signed, column.buckets)[encoded.indices.to_numpy()]
    return found


def _whole(rows: Rows, group: FittedInput) -> dict[str, npt.NDArray[Any]]:
    """An image, a vector or a sparse vector."""
    array, where = _column(rows, group.source), "features"
    if group.kind == "image":
        column = Column(name=group.name, kind="image", dtype="uint8", shape=group.shape)
        return {group.name: to_array(array, column, where=where)}
    if group.kind == "dense":
        column = Column(name=group.name, kind="dense", dtype="float32", shape=group.shape)
        return {group.name: to_array(array.cast(pa.list_(pa.float32()), safe=False), column, where=where)}
    parts = {"ids": ("ids", "sparse_ids", "int64"), "weights": ("values", "sparse_weights", "float32")}
    found: dict[str, npt.NDArray[Any]] = {}
    for part, (field, kind, dtype) in parts.items():
        column = Column.model_validate({"name": f"{group.name}_{part}", "kind": kind, "dtype": dtype})
        values = array.field(field).cast(pa.list_(pa.from_numpy_dtype(np.dtype(dtype))), safe=False)
        found[column.name] = to_padded(values, column, where=where)
    return found
