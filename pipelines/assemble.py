"""Feature columns as the vector that an MLlib family wants, or for ALS as the ids of user and item.

Linear models and networks see ids one-hot and sparse; trees see them as nominal attributes, and buckets, which have
an order, as numbers; sparse inputs stay sparse. The id of a category is never read as a number. No value gets a name
in the schema, as OneHotEncoder and VectorAssembler would give it, so that a vocabulary may have millions.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.ml.functions import array_to_vector
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import StructField, StructType

from pipelines.config.catalog import TREES
from pipelines.lake import Column, Contract

VECTOR = "features_vector"
USER, ITEM = "_user_id", "_item_id"
_SPARSE_VECTOR = 0  # VectorUDT's type tag


def assemble(rows: DataFrame, contract: Contract, *, estimator: str, keep: Sequence[str]) -> DataFrame:
    """The columns `keep`, and the inputs of the contract as one vector, `VECTOR`; for ALS as `USER` and `ITEM`.

    Args:
        rows: With the contract's input columns.
        contract: Their meaning.
        estimator: The MLlib class that reads the vector.
        keep: Columns of `rows` to pass through.
    """
    if estimator == "ALS":
        assert contract.recommended is not None, "refused without users and items"
        names = {USER: contract.recommended.user, ITEM: contract.recommended.item}
        return rows.select(*keep, *(F.col(name)[0].cast("int").alias(column) for column, name in names.items()))
    one_hot = estimator not in TREES
    columns = [column for column in contract.inputs if column.kind != "sparse_weights"]
    *starts, size = accumulate((_num_places(column, one_hot=one_hot) for column in columns), initial=0)
    values = F.concat(*(_values(column, one_hot=one_hot) for column in columns))
    if any(column.kind == "sparse_ids" or (column.kind == "ids" and one_hot) for column in columns):
        ids = F.concat(
            *(_places(column, start, one_hot=one_hot) for column, start in zip(columns, starts, strict=True))
        )
        vectors = sparse_vectors(rows, ids, values, size=size, name=VECTOR, keep=keep)
    else:
        vectors = rows.select(*keep, array_to_vector(values).alias(VECTOR))
    attributes: dict[str, Any] = {"num_attrs": size}
    nominal = [
        {"idx": start + place, "num_vals": num_values, "name": column.names[place]}
        for column, start in zip(columns, starts, strict=True)
        for place, num_values in _nominal(column)
    ]
    if nominal and not one_hot:
        attributes |= {"attrs": {"nominal": nominal}}
    return vectors.withMetadata(VECTOR, {"ml_attr": attributes})


def num_bins(contract: Contract) -> int:
    """The `maxBins` that the widest nominal attribute needs."""
    return max([2, *(num_values for column in contract.inputs for _, num_values in _nominal(column))])


def vector_size(contract: Contract, *, estimator: str) -> int:
    """Places of the assembled vector."""
    return sum(_num_places(column, one_hot=estimator not in TREES) for column in contract.inputs)


def _nominal(column: Column) -> list[tuple[int, int]]:
    """The places of ids that a tree takes as categories without an order, and the number of these."""
    if column.kind != "ids":
        return []
    ordered = column.ordered or (False,) * len(column.sizes)
    return [(place, size) for place, size in enumerate(column.sizes) if not ordered[place]]


def _num_places(column: Column, *, one_hot: bool) -> int:
    match column.kind:
        case "ids" if one_hot:
            return sum(column.sizes)
        case "sparse_ids":
            return column.sizes[0]
        case "sparse_weights":
            return 0
        case _:
            return column.width


def _values(column: Column, *, one_hot: bool) -> SparkColumn:
    """An array of double: of a sparse column the values at `_places`, else those of all its places."""
    match column.kind:
        case "ids" if one_hot:
            return F.array_repeat(F.lit(1.0), column.width)
        case "sparse_ids":
            return F.col(f"{column.input}_weights").cast("array<double>")
        case "image":
            return _pixels(column)
        case _:
            return F.col(column.name).cast("array<double>")


def _places(column: Column, start: int, *, one_hot: bool) -> SparkColumn:
    """Where a column's values stand in a sparse vector, in which its places begin at `start`."""
    match column.kind:
        case "ids" if one_hot:
            starts = accumulate(column.sizes[:-1], initial=start)
            return F.array(*(F.col(column.name)[place] + first for place, first in enumerate(starts)))
        case "sparse_ids":
            return F.transform(column.name, lambda place: place + start)
        case _:
            return F.sequence(F.lit(start), F.lit(start + column.width - 1)).cast("array<bigint>")


def sparse_vectors(
    rows: DataFrame, ids: SparkColumn, weights: SparkColumn, *, size: int, name: str, keep: Sequence[str]
) -> DataFrame:
    """The columns `keep`, and `name`: sparse vectors of `size` places.

    No SQL function makes one. VectorUDT's own struct of (type, size, indices, values) may come out of an Arrow batch,
    though, and is made there without a Python row.

    Args:
        rows: With the columns of the expressions.
        ids: An array, which rises.
        weights: Likewise; those of 0 are left out, and missing ones.
        size: Places of a vector.
        name: Of the vector's column.
        keep: Columns to pass through.
    """
    fields = [*(rows.schema[column] for column in keep), StructField(name, VectorUDT())]
    parts = rows.select(
        *keep, ids.cast("array<int>").alias(name), weights.cast("array<double>").alias(f"{name}_weights")
    )
    return parts.mapInArrow(_to_vectors(size), StructType(fields))


def _to_vectors(size: int) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def convert(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            *kept, ids, weights = batch.columns
            values = pc.fill_null(weights.flatten(), 0.0).to_numpy()
            is_kept = values != 0
            ends = np.cumsum(ids.value_lengths().to_numpy(zero_copy_only=False))
            num_kept = np.append(0, np.cumsum(is_kept))
            starts = pa.array(num_kept[np.append(0, ends)], pa.int32())
            vectors = {
                "type": pa.array(np.full(len(batch), _SPARSE_VECTOR, np.int8)),
                "size": pa.array(np.full(len(batch), size, np.int32)),
                "indices": pa.ListArray.from_arrays(starts, pa.array(ids.flatten().to_numpy()[is_kept])),
                "values": pa.ListArray.from_arrays(starts, pa.array(values[is_kept])),
            }
            vector = pa.StructArray.from_arrays(list(vectors.values()), list(vectors))
            yield pa.RecordBatch.from_arrays([*kept, vector], batch.schema.names[:-1])

    return convert  # by its value, so that Spark's workers need not have this package


def _pixels(column: Column) -> SparkColumn:
    """Bytes as scaled doubles: Latin-1 maps each byte to the character of the same number."""
    low, high = column.scale
    characters = F.split(F.decode(column.name, "ISO-8859-1"), "")
    return F.transform(characters, lambda c: F.ascii(c) * F.lit((high - low) / 255.0) + F.lit(low))
