"""The features stage: fit on the training split, then write one table a split, laid out for training.

A table is unpartitioned, its rows pre-shuffled by a seeded hash, one row group a file, and its column contract
travels in the commit's `userMetadata`.
"""

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from pipelines.config import Config
from pipelines.errors import DataError
from pipelines.features.apply import pad_sparse, transform, with_label
from pipelines.features.fit import Fit, fit
from pipelines.features.inspect import inspect_tables
from pipelines.features.layout import lay_out_tables
from pipelines.features.leaks import check_entities
from pipelines.features.split import with_split
from pipelines.lake import CONTRACT_KEY, Contract, Snapshot, scratch_path, table_path
from pipelines.plans import last_query, plans_since
from pipelines.receipt import write_json
from pipelines.session import get_session, spark_progress
from pipelines.stage import Given, Made
from pipelines.tables import TABLE, read_table, write_tables


def build(given: Given) -> Made:
    """Fit the features and write a table a split.

    Raises:
        DataError: Two rows have one key, an entity stands in two splits, a row has no split, or the rows do not fit the
            declared features (see `fit`).
    """
    config = given.config
    spark = get_session(config)
    raw = Snapshot.model_validate(given.inputs["ingest"].result["snapshot"])
    rows = with_split(read_table(spark, raw), config)
    before = last_query(spark)
    checks_entities = bool(config.split.entity) and config.split.leaks.entities != "off"
    warnings = check_entities(rows, config) if checks_entities else []
    with spark_progress(spark, "features: fit"):
        fitted = fit(rows, config)
    _check_splits(raw.rows - sum(fitted.rows.values()), config)
    passes = [*["entities"] * checks_entities, *fitted.passes, "write"]
    if config.source.key and not fitted.is_unique:
        passes.append("keys")
        _check_keys(rows, config.source.key)
    contract = fitted.fitted.contract(sparse_widths=fitted.sparse_widths)
    snapshots = _write(rows, fitted, contract, config)
    path = table_path(config.workload, "features") / "fitted.json"
    write_json(path, fitted.fitted)
    _report(given, fitted, snapshots, passes)
    given.run.text("explain.txt", plans_since(spark, before))
    inspected = inspect_tables(given, snapshots, contract.label, warnings=warnings)
    return Made(
        rows=sum(snapshot.rows for snapshot in snapshots.values()),
        result={
            "snapshots": {split: snapshot.model_dump(mode="json") for split, snapshot in snapshots.items()},
            "fitted": fitted.fitted.model_dump(mode="json"),
            "input_reads": passes,
            **inspected.result,
        },
        outputs=[
            *[str(file) for snapshot in snapshots.values() for file in snapshot.paths()],
            *[file for stored in fitted.fitted.stored for file in stored.paths()],
        ],
        lines=[
            ", ".join(f"{split} {s.rows:,} rows in {len(s.files)} files" for split, s in snapshots.items()),
            f"input read {len(passes)} times: {', '.join(passes)}",
            *fitted.notes,
            *inspected.lines,
        ],
    )


def _check_splits(rows_without: int, config: Config) -> None:
    if rows_without and config.split.by_time:
        raise DataError(
            f"split.time: wanted a moment in every row, {rows_without:,} rows have none in {config.split.by_time.column!r}; "
            "mend them in the source"
        )


def _check_keys(rows: DataFrame, key: list[str]) -> None:
    """Refuse two rows with one key; a collision of two hashes does no harm."""
    twice = rows.groupBy(*key).count().where("count > 1")
    found = twice.orderBy(*key).limit(3).collect()
    if found:
        shown = "; ".join(", ".join(f"{name}={row[name]}" for name in key) + f" ({row['count']} rows)" for row in found)
        raise DataError(f"source.key: wanted one row a key, seen {shown}; mend the rows, or name more columns")


def _write(rows: DataFrame, fitted: Fit, contract: Contract, config: Config) -> dict[str, Snapshot]:
    """The table of each split, all in one pass."""
    splits, layout = config.split.names, config.features.layout
    kept = ["row_id", "label", "_split"]
    table = with_label(rows, fitted.fitted.label)
    table = transform(table, fitted.fitted, keep=kept, fitted_on=F.col("_split") == "train")
    place = F.array_position(F.array(*map(F.lit, splits)), F.col("_split")).cast("int") - 1
    table = pad_sparse(table, fitted.sparse_widths)
    table = table.select(*[column.name for column in contract.columns], place.alias(TABLE))
    row_bytes = sum(column.bytes_per_row for column in contract.columns)
    sizes = [fitted.rows[split] * row_bytes for split in splits]
    snapshots = write_tables(
        lay_out_tables(table, sizes, shard_mb=layout.shard_mb, seed=config.seed),
        [table_path(config.workload, f"features/{split}") for split in splits],
        scratch=scratch_path(config.workload),
        what="features: write",
        metadata={CONTRACT_KEY: contract.model_dump(mode="json")},
        compression=layout.compression,
    )
    return dict(zip(splits, snapshots, strict=True))


def _report(given: Given, fitted: Fit, snapshots: dict[str, Snapshot], passes: list[str]) -> None:
    given.run.json("features.json", fitted.fitted.model_dump(mode="json"))
    given.run.metrics(
        {f"rows_{split}": snapshot.rows for split, snapshot in snapshots.items()} | {"input_reads": len(passes)}
    )
    given.run.params({f"input.{i.name}": i.kind for i in fitted.fitted.inputs})
    for split, snapshot in snapshots.items():
        given.run.dataset(snapshot, name=f"features_{split}", context=split)
