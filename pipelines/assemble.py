"""Feature columns as the vector that an MLlib family wants, or for ALS as the ids of user and item.

Linear models and networks see ids one-hot and sparse; trees see them as nominal attributes, and buckets, which have
an order, as numbers; sparse inputs stay sparse. The id of a category is never read as a number.
"""

from collections.abc import Sequence

from pyspark.ml.feature import OneHotEncoder, VectorAssembler
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


def assembled(estimator: str) -> list[str]:
    """The columns that `assemble` adds for an MLlib class."""
    return [USER, ITEM] if estimator == "ALS" else [VECTOR]


def assemble(rows: DataFrame, contract: Contract, *, estimator: str) -> DataFrame:
    """`rows` with the inputs of the contract as one vector column, `VECTOR`; for ALS with `USER` and `ITEM`.

    Args:
        rows: With the contract's input columns.
        contract: Their meaning.
        estimator: The MLlib class that reads the vector.
    """
    if estimator == "ALS":
        assert contract.recommended is not None, "refused without users and items"
        ids = {USER: contract.recommended.user, ITEM: contract.recommended.item}
        return rows.withColumns({column: F.col(name)[0].cast("int") for column, name in ids.items()})
    one_hot = estimator not in TREES
    given = list(rows.columns)
    parts: list[str] = []
    inputs = list(contract.inputs)
    for column in inputs:
        name = f"_vector_{column.name}"
        if column.kind == "ids":
            rows, names = _add_ids(rows, column, one_hot=one_hot)
            parts += names
            continue
        if column.kind == "sparse_weights":
            continue
        if column.kind == "sparse_ids":
            weights = f"{column.input}_weights"
            rows = rows.withColumn(name, sparse_vector(column.name, weights, size=column.sizes[0]))
        elif column.kind == "image":
            rows = rows.withColumn(name, array_to_vector(_pixels(column)))
        else:
            rows = rows.withColumn(name, array_to_vector(F.col(column.name)))
        rows = rows.withMetadata(name, {"ml_attr": {"num_attrs": _width(column)}})
        parts.append(name)
    if len(parts) == 1 and contract.inputs[0].kind != "ids":
        return rows.withColumnRenamed(parts[0], VECTOR).select(*given, VECTOR)
    return VectorAssembler(inputCols=parts, outputCol=VECTOR).transform(rows).select(*given, VECTOR)


def num_bins(contract: Contract) -> int:
    """The `maxBins` that the widest nominal attribute needs."""
    ids = [column for column in contract.inputs if column.kind == "ids"]
    nominal = [
        size for column in ids for size, is_nominal in zip(column.sizes, _nominal(column), strict=True) if is_nominal
    ]
    return max([2, *nominal])


def vector_size(contract: Contract, *, estimator: str) -> int:
    """Places of the assembled vector."""
    size = 0
    for column in contract.inputs:
        if column.kind == "ids":
            size += len(column.sizes) if estimator in TREES else sum(column.sizes)
        elif column.kind != "sparse_weights":
            size += _width(column)
    return size


def _width(column: Column) -> int:
    return column.sizes[0] if column.kind == "sparse_ids" else column.width


def _nominal(column: Column) -> list[bool]:
    """For each place of ids whether a tree takes them as categories without an order."""
    return [not is_ordered for is_ordered in column.ordered or (False,) * len(column.sizes)]


def _add_ids(rows: DataFrame, column: Column, *, one_hot: bool) -> tuple[DataFrame, list[str]]:
    names = [f"_id_{column.name}_{place}" for place in range(len(column.sizes))]
    places = []
    for place, (name, is_nominal) in enumerate(zip(names, _nominal(column), strict=True)):
        values = [str(i) for i in range(column.sizes[place])]
        nominal = {"ml_attr": {"type": "nominal", "vals": values, "name": column.names[place]}}
        metadata = nominal if one_hot or is_nominal else {}
        places.append(F.col(column.name)[place].cast("double").alias(name, metadata=metadata))
    rows = rows.select("*", *places)
    if not one_hot:
        return rows, names
    encoded = [f"{name}_one_hot" for name in names]
    encoder = OneHotEncoder(inputCols=names, outputCols=encoded, dropLast=False)
    return encoder.fit(rows).transform(rows), encoded


def sparse_vector(ids: str, weights: str, *, size: int) -> SparkColumn:
    """A sparse vector of `size` places from columns of ids, which rise, and weights; those of 0 are left out.

    No public function makes one from columns; JSON does, through VectorUDT's own struct of (type, size, indices,
    values), and doubles survive it exactly.
    """
    pairs = F.filter(F.arrays_zip(ids, weights), lambda pair: pair[weights] != 0)
    vector = F.struct(
        F.lit(_SPARSE_VECTOR).alias("type"),
        F.lit(size).alias("size"),
        F.transform(pairs, lambda pair: pair[ids]).alias("indices"),
        F.transform(pairs, lambda pair: pair[weights].cast("double")).alias("values"),
    )
    schema = StructType([StructField("vector", VectorUDT())])
    return F.from_json(F.to_json(F.struct(vector.alias("vector"))), schema)["vector"]


def _pixels(column: Column) -> SparkColumn:
    """Bytes as scaled doubles: Latin-1 maps each byte to the character of the same number."""
    low, high = column.scale
    characters = F.split(F.decode(column.name, "ISO-8859-1"), "")
    return F.transform(characters, lambda c: F.ascii(c) * F.lit((high - low) / 255.0) + F.lit(low))


def input_names(contract: Contract) -> Sequence[str]:
    """The contract's input columns by name."""
    return [column.name for column in contract.inputs]
