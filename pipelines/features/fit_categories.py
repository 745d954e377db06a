"""Fit vocabularies and encodings from the counts of their values: in the driver, or on Spark where they are many."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from pyspark.sql import Column, DataFrame, Observation
from pyspark.sql import functions as F

from pipelines.config import Config
from pipelines.config.steps import Frequency, Hash, Target, Vocabulary
from pipelines.features.fit_values import Count, Counted
from pipelines.features.fitted import MISSING, FittedCategory, FittedEncoding, Floats, Stored
from pipelines.lake import UINT64, scratch_path, table_path

Ints = npt.NDArray[np.int64]


def fit_category(
    config: Config, name: str, place: int, counted: Counted, num_rows: int, notes: list[str]
) -> FittedCategory | FittedEncoding:
    """The vocabulary, hash or encoding of one place of an input.

    Args:
        config: The workload.
        name: The input.
        place: The place in it.
        counted: Of all columns.
        num_rows: Training rows.
        notes: Takes what a user should know.
    """
    group = config.features.inputs[name]
    options = group.reads_values.options  # type: ignore[union-attr]
    columns = group.sources[place]
    column = columns[0] if len(columns) == 1 else columns
    if isinstance(options, Hash):
        return FittedCategory(column=column, buckets=options.buckets, seed=config.seed)
    most = options.max_share * num_rows if isinstance(options, Vocabulary) else math.inf
    large = counted.large.get((name, place))
    counts = counted.columns.get((name, place), [])
    encoding: _Shares | _Means | None = None
    if isinstance(options, Frequency):
        encoding = _Shares(num_rows)
    elif isinstance(options, Target):
        by_fold = _totals(large, options.folds) if large else _arrays(counts, options.folds)
        encoding = _Means(by_fold[0].sum(axis=0), by_fold[1].sum(axis=0), options.smoothing)
    given: dict[str, Any]
    if large:
        folder = table_path(config.workload, f"features/values/{name}_{place}")
        stored = _store(large.where(_num() <= most), options, encoding, folder, scratch_path(config.workload))
        notes.append(
            f"features.inputs.{name}: column {' x '.join(columns)!r}: its {stored.size:,} values stay in a table and are "
            f"joined by shuffle: {folder}"
        )
        given = {"stored": stored}
    else:
        given = _inline([count for count in counts if count.num <= most], options, encoding)
    if encoding is None:
        return FittedCategory(column=column, **given)
    return FittedEncoding(column=column, seed=config.seed, **encoding.others(), **given)


@dataclass(frozen=True)
class _Shares:
    """Frequency encoding."""

    num_rows: int

    def __call__(self, rows: Ints, labels: Floats) -> tuple[Floats, Floats]:
        """Each value's share of the rows, of shape (values,), and no folds, of shape (values, 0)."""
        return rows.sum(axis=1) / self.num_rows, np.empty((len(rows), 0))

    def others(self) -> dict[str, Any]:
        """What a value that was not seen gets."""
        return {"other": 0.0}


@dataclass(frozen=True)
class _Means:
    """Target encoding.

    Attributes:
        rows: All training rows by fold. Shape (folds,).
        labels: The sums of their labels, likewise.
    """

    rows: Ints
    labels: Floats
    smoothing: float

    def __call__(self, rows: Ints, labels: Floats) -> tuple[Floats, Floats]:
        """Means of each value's labels, of shape (values,), and those without each fold, of shape (values, folds)."""
        folds = [self._mean(rows, labels, but=part) for part in range(len(self.rows))]
        return self._mean(rows, labels), np.stack(folds, axis=1)

    def others(self) -> dict[str, Any]:
        """What a value that was not seen gets, in the rows of each fold and in all others."""
        folds = tuple(float(self._prior(but=part)) for part in range(len(self.rows)))
        return {"other": float(self._prior()), "fold_others": folds}

    def _mean(self, rows: Ints, labels: Floats, but: int | None = None) -> Floats:
        num, total, prior = _without(rows, but), _without(labels, but), self._prior(but)
        drawn = (total + self.smoothing * prior) / np.maximum(num + self.smoothing, np.finfo(np.float64).tiny)
        return np.where(num > 0, drawn, prior)

    def _prior(self, but: int | None = None) -> float:
        num = _without(self.rows, but)
        return float(_without(self.labels, but) / num) if num else float(self.labels.sum() / max(self.rows.sum(), 1))


def _without(by_fold: npt.NDArray[Any], but: int | None) -> Any:
    """The sum over all folds (the last axis) but one."""
    return (by_fold if but is None else np.delete(by_fold, but, axis=-1)).sum(axis=-1)


def _arrays(counts: Sequence[Count], folds: int) -> tuple[Ints, Floats]:
    """Rows and labels, of shape (values, folds)."""
    rows, labels = [count.rows for count in counts], [count.labels for count in counts]
    return np.array(rows, np.int64).reshape(-1, folds), np.array(labels, np.float64).reshape(-1, folds)


def _inline(
    counts: Sequence[Count], options: Vocabulary | Frequency | Target, encoding: _Shares | _Means | None
) -> dict[str, Any]:
    kept = [count for count in counts if count.num >= options.min_count]
    if isinstance(options, Vocabulary):
        kept = kept[: options.max_size]
    given: dict[str, Any] = {"values": tuple(count.value for count in kept)}
    if encoding is not None:
        numbers, folds = encoding(*_arrays(kept, len(kept[0].rows) if kept else 1))
        given |= {"numbers": tuple(numbers.tolist()), "folds": tuple(map(tuple, folds.T.tolist()))}
    return given


def _totals(large: DataFrame, folds: int) -> tuple[Ints, Floats]:
    """Rows and labels of all values together, of shape (1, folds)."""
    sums = [F.sum(F.get(name, F.lit(part))) for name in ("rows", "labels") for part in range(folds)]
    seen = large.agg(*[column.alias(str(number)) for number, column in enumerate(sums)]).first()
    assert seen is not None
    return np.array([seen[:folds]], np.int64), np.array([seen[folds:]], np.float64)


def _store(
    large: DataFrame,
    options: Vocabulary | Frequency | Target,
    encoding: _Shares | _Means | None,
    folder: Path,
    scratch: Path,
) -> Stored:
    """Rank the values, most frequent first and ties in their order, and write them as a Delta table.

    The ranks are positions in files that were sorted by ranges, so that no task sees more than its share.
    """
    spark, seen = large.sparkSession, Observation()
    kept = large.withColumn("num", _num())
    order = [F.desc("num"), F.asc_nulls_first("value")]
    kept = kept.where(F.col("num") >= options.min_count).repartitionByRange(*order).sortWithinPartitions(*order)
    with TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as ranked:
        kept.write.mode("overwrite").parquet(ranked)
        starts, files = 0, dict[str, int]()
        for file in sorted(Path(ranked).glob("*.parquet")):
            files[file.name] = starts
            starts += pq.read_metadata(file).num_rows
        start = F.create_map(*[F.lit(part) for pair in files.items() for part in pair])[F.col("_metadata.file_name")]
        rows = spark.read.parquet(ranked).select(
            F.coalesce("value", F.lit(MISSING)).alias("value"),
            (F.col("_metadata.row_index") + start + 1).alias("id"),
            *(["rows", "labels"] if encoding else []),
        )
        if isinstance(options, Vocabulary) and options.max_size:
            rows = rows.where(F.col("id") <= options.max_size)
        if encoding:
            rows = rows.mapInArrow(
                partial(_encoded, encoding), "value string, id bigint, number double, folds array<double>"
            )
        digest = F.sum(F.xxhash64(*rows.columns).cast("decimal(20,0)"))
        observed = rows.observe(seen, F.count(F.lit(1)).alias("rows"), digest.alias("digest"))
        observed.write.format("delta").mode("overwrite").option("overwriteSchema", "true").save(str(folder))
    names = pa.table(DeltaTable(str(folder)).get_add_actions(flatten=True)).column("path").to_pylist()
    digest_hex = f"{int(seen.get['digest'] or 0) % UINT64:016x}"
    return Stored(folder=str(folder), files=tuple(sorted(names)), size=seen.get["rows"], digest=digest_hex)


def _num() -> Column:
    """Rows of a value over all folds."""
    return F.aggregate("rows", F.lit(0).cast("bigint"), lambda a, b: a + b)


def _encoded(encoding: "_Shares | _Means", batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in filter(len, batches):
        rows, labels = (
            batch.column(name).flatten().to_numpy().reshape(batch.num_rows, -1) for name in ("rows", "labels")
        )
        numbers, folds = encoding(rows, labels)
        lists = pa.array(list(folds), pa.list_(pa.float64()))
        columns = [batch.column("value"), batch.column("id"), pa.array(numbers), lists]
        yield pa.RecordBatch.from_arrays(columns, ["value", "id", "number", "folds"])
