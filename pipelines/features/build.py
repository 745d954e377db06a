"""The features stage: fit on the training split, then write one table a split, laid out for training.

A table is unpartitioned, its rows pre-shuffled by a seeded hash, one row group a file, and its column contract
travels in the commit's `userMetadata`.
"""

import math

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from pipelines.config import Config
from pipelines.config.data import HashSplit
from pipelines.errors import DataError
from pipelines.features.apply import pad_sparse, transform, with_label
from pipelines.features.fit import Fit, fit
from pipelines.lake import CONTRACT_KEY, Contract, Snapshot, table_path
from pipelines.receipt import write_json
from pipelines.session import get_session, spark_progress
from pipelines.stage import Given, Made
from pipelines.tables import read_table, write_table

_SPLIT_BITS = 1 << 20


def build(given: Given) -> Made:
    """Fit the features and write a table a split.

    Raises:
        DataError: Two rows have one key, or the rows do not fit the declared features (see `fit`).
    """
    config = given.config
    spark = get_session(config)
    raw = Snapshot.model_validate(given.inputs["ingest"].result["snapshot"])
    rows = read_table(spark, raw)
    if config.source.key:
        _check_keys(rows, config.source.key)
    rows = with_split(rows, config)
    with spark_progress(spark, "features: fit"):
        fitted = fit(rows, config)
    contract = fitted.fitted.contract(sparse_widths=fitted.sparse_widths)
    snapshots = {split: _write_split(rows, split, fitted, contract, config) for split in config.split.names}
    path = table_path(config.workload, "features") / "fitted.json"
    write_json(path, fitted.fitted)
    _report(given, fitted, snapshots)
    return Made(
        rows=sum(snapshot.rows for snapshot in snapshots.values()),
        result={
            "snapshots": {split: snapshot.model_dump(mode="json") for split, snapshot in snapshots.items()},
            "fitted": fitted.fitted.model_dump(mode="json"),
        },
        outputs=[str(file) for snapshot in snapshots.values() for file in snapshot.paths()],
        lines=[
            ", ".join(f"{split} {s.rows:,} rows in {len(s.files)} files" for split, s in snapshots.items()),
            *fitted.notes,
        ],
    )


def with_split(rows: DataFrame, config: Config) -> DataFrame:
    """`rows` with a column `_split`, by the config; the same for a row wherever and whenever it is computed."""
    split = config.split
    by = (split.by_hash or HashSplit()).by
    entity = F.xxhash64(*by) if by else F.col("row_id")
    if not split.given:
        shares = (split.by_hash or HashSplit()).shares
        rows = rows.withColumn("_split", _by_shares(entity, shares, config.seed, "split"))
    if split.validation:
        cut = _place(entity, config.seed, "validation") < F.lit(round(split.validation.share * _SPLIT_BITS))
        moved = F.when((F.col("_split") == split.validation.source) & cut, F.lit("validation"))
        rows = rows.withColumn("_split", moved.otherwise(F.col("_split")))
    return rows


def _place(entity: Column, seed: int, purpose: str) -> Column:
    """A number in [0, 2^20) by a hash of the entity, independent for each purpose."""
    return F.pmod(F.xxhash64(entity, F.lit(f"{purpose}:{seed}")), F.lit(_SPLIT_BITS))


def _by_shares(entity: Column, shares: dict[str, float], seed: int, purpose: str) -> Column:
    place, *names = _place(entity, seed, purpose), *shares
    upper, chosen = 0.0, F.lit(names[-1])
    bounds = []
    for name in names[:-1]:
        upper += shares[name]
        bounds.append((name, round(upper * _SPLIT_BITS)))
    for name, bound in reversed(bounds):
        chosen = F.when(place < F.lit(bound), F.lit(name)).otherwise(chosen)
    return chosen


def _check_keys(rows: DataFrame, key: list[str]) -> None:
    """Refuse two rows with one key; a collision of two hashes does no harm."""
    twice = rows.groupBy(*key).count().where("count > 1")
    found = twice.orderBy(*key).limit(3).collect()
    if found:
        shown = "; ".join(", ".join(f"{name}={row[name]}" for name in key) + f" ({row['count']} rows)" for row in found)
        raise DataError(f"source.key: wanted one row a key, seen {shown}; mend the rows, or name more columns")


def _write_split(rows: DataFrame, split: str, fitted: Fit, contract: Contract, config: Config) -> Snapshot:
    part = with_label(rows.where(F.col("_split") == split), fitted.fitted.label)
    table = pad_sparse(transform(part, fitted.fitted, keep=["row_id", "label"]), fitted.sparse_widths)
    table = table.select(*[column.name for column in contract.columns])
    raw_bytes = fitted.rows[split] * sum(column.bytes_per_row for column in contract.columns)
    num_files = max(1, math.ceil(raw_bytes / (config.features.layout.shard_mb * 1e6)))
    shuffled = table.repartition(num_files, F.xxhash64("row_id", F.lit(f"file:{config.seed}"))).sortWithinPartitions(
        F.xxhash64("row_id", F.lit(f"order:{config.seed}"))
    )
    return write_table(
        shuffled,
        table_path(config.workload, f"features/{split}"),
        what=f"features: write {split}",
        metadata={CONTRACT_KEY: contract.model_dump(mode="json")},
    )


def _report(given: Given, fitted: Fit, snapshots: dict[str, Snapshot]) -> None:
    given.run.json("features.json", fitted.fitted.model_dump(mode="json"))
    given.run.metrics({f"rows_{split}": snapshot.rows for split, snapshot in snapshots.items()})
    given.run.params({f"input.{i.name}": i.kind for i in fitted.fitted.inputs})
    for split, snapshot in snapshots.items():
        given.run.dataset(snapshot, name=f"features_{split}", context=split)
