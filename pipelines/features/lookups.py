"""Ids and numbers of values, looked up or hashed as Spark does it, on Arrow arrays of text."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from pipelines.arrays import one_chunk
from pipelines.errors import DataError
from pipelines.features.fitted import MISSING, FittedCategory, FittedEncoding

_FEW = 512  # rows for which a dictionary is faster than a hash table that Arrow builds anew for each call
_HASHED_AT_ONCE = 1 << 16
_SPARK_SEED = 42  # of its xxhash64

Ids: TypeAlias = npt.NDArray[np.int64]


def text_of(array: pa.Array, name: str) -> pa.Array:
    """Values as Spark casts them to text, `MISSING` for null.

    Raises:
        DataError: They are of a type that has no such text.
    """
    if pa.types.is_floating(array.type):
        raise DataError(f"features: column {name!r}: wanted text, whole numbers, booleans or dates, seen {array.type}")
    return pc.fill_null(array if pa.types.is_string(array.type) else array.cast(pa.string()), MISSING)


def reader_of(column: FittedCategory | FittedEncoding) -> Callable[[pa.Array], npt.NDArray[Any]]:
    """What gives the id or number of each text, of shape (rows,)."""
    if isinstance(column, FittedCategory) and column.buckets is not None:
        return lambda texts: _hashed(texts, column)
    field, other = ("id", 0) if isinstance(column, FittedCategory) else ("number", column.other)
    places: _Lookup | _StoredLookup
    if column.stored:
        table = pa.concat_tables([pq.read_table(path, columns=["value", field]) for path in column.stored.paths()])
        places, given = _StoredLookup(table.column("value")), table.column(field).to_numpy()
    else:
        places = _Lookup(column.values or ())
        given = range(1, len(column.values or ()) + 1) if isinstance(column, FittedCategory) else column.numbers
    array = np.array([*given, other])  # a value that has none is at -1
    return lambda texts: array[places(texts)]


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

    def __init__(self, values: pa.ChunkedArray) -> None:
        self._values = one_chunk(values)
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
