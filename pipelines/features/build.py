"""The features stage: fit on the training split, then write one table a split, laid out for training.

A table is unpartitioned, its rows pre-shuffled by a seeded hash, one row group a file, and its column contract
travels in the commit's `userMetadata`.
"""

from dataclasses import dataclass

from pyspark.sql import DataFrame

from pipelines.config import Config
from pipelines.errors import DataError
from pipelines.features.append import Kept, append_rows, plan_append
from pipelines.features.fit import fit
from pipelines.features.fitted import FittedFeatures
from pipelines.features.inspect import inspect_tables
from pipelines.features.leaks import check_entities
from pipelines.features.split import with_split
from pipelines.features.tables import check_keys, feature_rows, write_features
from pipelines.lake import Snapshot, table_path
from pipelines.plans import last_query, plans_since
from pipelines.receipt import write_json
from pipelines.session import get_session, spark_progress
from pipelines.stage import Given, Made
from pipelines.tables import read_table


@dataclass(frozen=True)
class _Written:
    """The tables and the transform that made them; what the input was read for, and what a user should know."""

    fitted: FittedFeatures
    snapshots: dict[str, Snapshot]
    passes: list[str]
    notes: list[str]


def build(given: Given) -> Made:
    """Fit the features and write a table a split; or add the rows that came to those that are there.

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
    plan = plan_append(given, raw)
    if isinstance(plan, Kept):
        snapshots = append_rows(spark, plan, raw, config)
        written = _Written(plan.fitted, snapshots, ["check of what came", "write of what came"], [plan.why])
    else:
        written = _fit_and_write(rows, raw.rows, config)
        written.notes.extend([plan] if plan else [])
    passes, snapshots, fitted = ["entities"] * checks_entities + written.passes, written.snapshots, written.fitted
    path = table_path(config.workload, "features") / "fitted.json"
    write_json(path, fitted)
    _report(given, fitted, snapshots, passes)
    given.run.text("explain.txt", plans_since(spark, before))
    inspected = inspect_tables(given, snapshots, fitted.label.spec, warnings=warnings)
    return Made(
        rows=sum(snapshot.rows for snapshot in snapshots.values()),
        result={
            "snapshots": {split: snapshot.model_dump(mode="json") for split, snapshot in snapshots.items()},
            "fitted": fitted.model_dump(mode="json"),
            "raw_version": raw.version,
            "input_reads": passes,
            **inspected.result,
        },
        outputs=[
            *[str(file) for snapshot in snapshots.values() for file in snapshot.paths()],
            *[file for stored in fitted.stored for file in stored.paths()],
        ],
        lines=[
            ", ".join(f"{split} {s.rows:,} rows in {len(s.files)} files" for split, s in snapshots.items()),
            f"input read {len(passes)} times: {', '.join(passes)}",
            *written.notes,
            *inspected.lines,
        ],
    )


def _fit_and_write(rows: DataFrame, num_rows: int, config: Config) -> _Written:
    """All rows, by a transform that is fitted on those of train."""
    with spark_progress(rows.sparkSession, "features: fit"):
        found = fit(rows, config)
    _check_splits(num_rows - sum(found.rows.values()), config)
    passes = [*found.passes, "write"]
    if config.source.key and not found.is_unique:
        passes.append("keys")
        check_keys(rows, config.source.key)
    contract = found.fitted.contract(sparse_widths=found.sparse_widths)
    table = feature_rows(rows, found.fitted, contract, config.split.names)
    snapshots = write_features(table, found.rows, contract, config)
    return _Written(found.fitted, snapshots, passes, found.notes)


def _check_splits(rows_without: int, config: Config) -> None:
    if rows_without and config.split.by_time:
        raise DataError(
            f"split.time: wanted a moment in every row, {rows_without:,} rows have none in {config.split.by_time.column!r}; "
            "mend them in the source"
        )


def _report(given: Given, fitted: FittedFeatures, snapshots: dict[str, Snapshot], passes: list[str]) -> None:
    given.run.json("features.json", fitted.model_dump(mode="json"))
    given.run.metrics(
        {f"rows_{split}": snapshot.rows for split, snapshot in snapshots.items()} | {"input_reads": len(passes)}
    )
    given.run.params({f"input.{i.name}": i.kind for i in fitted.inputs})
    for split, snapshot in snapshots.items():
        given.run.dataset(snapshot, name=f"features_{split}", context=split)
