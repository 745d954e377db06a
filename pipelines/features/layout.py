"""The layout that streams, one row group a file and rows shuffled once, and any Delta table written anew in it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from pyspark.ml.functions import vector_to_array
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from pipelines.errors import DataError
from pipelines.lake import ROW_ID, Snapshot
from pipelines.tables import TABLE, write_table

_PLAIN = (T.BooleanType, T.ByteType, T.ShortType, T.IntegerType, T.LongType, T.FloatType, T.DoubleType)
_BYTES = {"boolean": 1, "tinyint": 1, "smallint": 2, "int": 4, "float": 4}


def rewrite(
    spark: SparkSession,
    source: str,
    target: Path,
    *,
    version: int | None = None,
    columns: Sequence[str] = (),
    key: Sequence[str] = (),
    fill: Mapping[str, float] | None = None,
    pad: Mapping[str, int] | None = None,
    shard_mb: float = 16.0,
    compression: str = "lz4_raw",
    seed: int = 0,
) -> Snapshot:
    """Write the rows of `source` to `target`.

    Decimals become doubles, timestamps microseconds and dates days since 1970, MLlib's vectors lists of floats.

    Args:
        spark: The session.
        source: A Delta table of any kind: Spark reads what streaming refuses.
        target: Folder of the new table.
        version: Of `source`; the latest by default.
        columns: Those to keep; all by default.
        key: Columns whose hash is `row_id` where the table has none; all by default.
        fill: What stands in for nulls, by column.
        pad: Lengths to which lists are filled up with zeros, by column.
        shard_mb: Size of a file in MB of raw column data.
        compression: Codec of the files.
        seed: Of the order of rows.

    Raises:
        DataError: A column cannot become a tensor, has nulls or lists of several lengths; with the option that helps.
    """
    reader = spark.read.format("delta")
    rows = (reader if version is None else reader.option("versionAsOf", version)).load(source)
    fields = [f for f in rows.schema.fields if f.name in (columns or rows.columns) or f.name == ROW_ID]
    if missing := set(columns) - {field.name for field in fields}:
        raise DataError(f"{source}: wanted a column {min(missing)!r}, seen {', '.join(rows.columns)}")
    plain = rows.select(
        *[_plain(field, source, (fill or {}).get(field.name), (pad or {}).get(field.name)) for field in fields],
        *([] if ROW_ID in rows.columns else [F.xxhash64(*(key or [f.name for f in fields])).alias(ROW_ID)]),
    )
    row_bytes, num_rows = _check(plain, source)
    laid_out = lay_out(plain, num_rows * row_bytes, shard_mb=shard_mb, seed=seed)
    return write_table(laid_out, target, what=f"layout: write {target}", compression=compression)


def lay_out(rows: DataFrame, raw_bytes: int, *, shard_mb: float, seed: int) -> DataFrame:
    """Rows in the partitions that become files, and in their order there: both by seeded hashes of `row_id`.

    Args:
        rows: With a column `row_id`.
        raw_bytes: Of all columns of all rows.
        shard_mb: Size of a file in MB of raw column data.
        seed: Of the order of rows.
    """
    files = _num_files(raw_bytes, shard_mb)
    return rows.repartition(files, _file_hash(seed)).sortWithinPartitions(_order_hash(seed))


def lay_out_tables(rows: DataFrame, raw_bytes: Sequence[float], *, shard_mb: float, seed: int) -> DataFrame:
    """Likewise for the rows of several tables in one shuffle: a partition holds rows of one table.

    Args:
        rows: With columns `row_id` and `TABLE`.
        raw_bytes: Of all columns of all rows of each table.
        shard_mb: Size of a file in MB of raw column data.
        seed: Of the order of rows.
    """
    counts = [_num_files(size, shard_mb) for size in raw_bytes]
    starts = [sum(counts[:place]) for place in range(len(counts))]
    file = F.get(F.array(*map(F.lit, starts)), TABLE) + F.pmod(
        F.hash(_file_hash(seed)), F.get(F.array(*map(F.lit, counts)), TABLE)
    )
    keys = F.array(*map(F.lit, _partition_keys(rows.sparkSession, sum(counts))))
    return rows.repartition(sum(counts), F.get(keys, file)).sortWithinPartitions(TABLE, _order_hash(seed))


def _num_files(raw_bytes: float, shard_mb: float) -> int:
    return max(1, math.ceil(raw_bytes / (shard_mb * 1e6)))


def _file_hash(seed: int) -> Column:
    return F.xxhash64(ROW_ID, F.lit(f"file:{seed}"))


def _order_hash(seed: int) -> Column:
    return F.xxhash64(ROW_ID, F.lit(f"order:{seed}"))


def _partition_keys(spark: SparkSession, num: int) -> list[int]:
    """For each of `num` partitions a number whose hash leads there, since Spark takes no partition's number itself."""
    key = F.col("id").cast("int")
    place = F.pmod(F.hash(key), F.lit(num))
    tries = spark.range(64 * num).select(key.alias("key"), place.alias("place"))  # one is missed with e^-64
    found = tries.groupBy("place").agg(F.min("key").alias("key")).orderBy("place").toArrow()
    keys: list[int] = found.column("key").to_pylist()
    assert len(keys) == num, "a key for each partition"
    return keys


def _plain(field: T.StructField, source: str, fill: float | None, width: int | None) -> Column:
    column, kind = F.col(f"`{field.name}`"), field.dataType
    if isinstance(kind, VectorUDT):
        column, kind = vector_to_array(column, "float32"), T.ArrayType(T.FloatType())
    elif isinstance(kind, T.DecimalType):
        column, kind = column.cast("double"), T.DoubleType()
    elif isinstance(kind, T.TimestampType):
        column, kind = F.unix_micros(column), T.LongType()
    elif isinstance(kind, T.DateType):
        column, kind = F.unix_date(column), T.IntegerType()
    elif isinstance(kind, T.ArrayType) and isinstance(kind.elementType, T.DecimalType | T.BooleanType):
        kind = T.ArrayType(T.DoubleType())
        column = column.cast(kind)
    is_list = isinstance(kind, T.ArrayType) and isinstance(kind.elementType, _PLAIN)
    if not (isinstance(kind, (*_PLAIN, T.BinaryType)) or is_list):
        raise DataError(
            f"{source}: column {field.name!r}: wanted numbers, booleans, lists of numbers or bytes, seen "
            f"{kind.simpleString()}; leave it out with --columns, or encode it by the features of a workload"
        )
    if width is not None and isinstance(kind, T.ArrayType):
        zeros = F.array_repeat(F.lit(0).cast(kind.elementType), width)
        longer = F.size(column) > width
        column = F.when(~longer, F.slice(F.concat(column, zeros), 1, width)).otherwise(column)
    if fill is not None:
        value = F.lit(fill).cast(kind.elementType if isinstance(kind, T.ArrayType) else kind)
        column = F.transform(column, lambda x: F.coalesce(x, value)) if is_list else F.coalesce(column, value)
    return column.alias(field.name)


def _check(rows: DataFrame, source: str) -> tuple[int, int]:
    """Bytes of a row and number of rows; refuses nulls and lists of several lengths."""
    asked = [F.count(F.lit(1)).alias("rows")]
    for name, kind in rows.dtypes:
        column, is_list, is_bytes = F.col(f"`{name}`"), kind.startswith("array"), kind == "binary"
        is_null = (column.isNull() | F.exists(column, lambda x: x.isNull())) if is_list else column.isNull()
        asked.append(F.count_if(is_null).alias(f"nulls {name}"))
        length = F.size(column) if is_list else F.octet_length(column) if is_bytes else F.lit(1)
        asked += [F.min(length).alias(f"least {name}"), F.max(length).alias(f"most {name}")]
    seen = rows.agg(*asked).first()
    assert seen is not None
    row_bytes = 0
    for name, kind in rows.dtypes:
        if nulls := seen[f"nulls {name}"]:
            raise DataError(f"{source}: column {name!r}: wanted no nulls, seen {nulls:,}; --fill {name}=0 fills them")
        least, most = seen[f"least {name}"] or 0, seen[f"most {name}"] or 0
        if least != most:
            how = f"--pad {name}={most} fills them up" if kind.startswith("array") else "leave it out with --columns"
            raise DataError(f"{source}: column {name!r}: wanted one length, seen {least} to {most}; {how}")
        element = kind.removeprefix("array<").removesuffix(">")
        row_bytes += most * (1 if kind == "binary" else _BYTES.get(element, 8))
    return row_bytes, seen["rows"]
