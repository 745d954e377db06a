"""Add the rows that came to the feature tables, by the transform as it was fitted: `features.refit: false`.

Only the files that the raw table got since are read. A transform that is fitted anew cannot do so: new rows move its
statistics, and with them the values of every row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from deltalake import DeltaTable
from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.config import Config
from pipelines.errors import DataError, LakeError
from pipelines.features.fitted import FittedFeatures, Stored
from pipelines.features.split import with_split
from pipelines.features.tables import check_keys, feature_rows, write_features
from pipelines.lake import Column, Contract, Snapshot, receipt_path
from pipelines.receipt import Receipt, changed, read_receipt
from pipelines.stage import Given
from pipelines.tables import TABLE, current_version, read_table

_INGEST = "input ingest"


@dataclass(frozen=True)
class Kept:
    """What stays as it is.

    Attributes:
        fitted: The transform.
        snapshots: The feature table of each split.
        files: Those of the raw table whose rows are not in them.
        why: What is read, for the user.
    """

    fitted: FittedFeatures
    snapshots: Mapping[str, Snapshot]
    files: list[Path]
    why: str

    @property
    def contract(self) -> Contract:
        """Of the feature tables."""
        contract = self.snapshots["train"].contract
        assert contract is not None, "a feature table carries its contract"
        return contract


def plan_append(given: Given, raw: Snapshot) -> Kept | str:
    """What stays and what came, or why all rows are read; an empty reason the first time.

    Args:
        given: What the stage works from.
        raw: The ingested table.
    """
    before = read_receipt(receipt_path(given.config.workload, "features"))
    if before is None:
        return ""
    parts = changed(before.made_from, given.made_from)
    if given.config.features.refit:
        if parts != [_INGEST]:
            return ""
        return "reads all rows: those that came move the fitted values, and so every row's (features.refit: false keeps them)"
    if others := [part for part in parts if part != _INGEST]:
        return f"fits anew in spite of features.refit: {', '.join(others[:3])} changed"
    return _kept(before, raw)


def _kept(before: Receipt, raw: Snapshot) -> Kept | str:
    snapshots = {split: Snapshot.model_validate(value) for split, value in before.result["snapshots"].items()}
    fitted = FittedFeatures.model_validate(before.result["fitted"])
    try:
        held = Snapshot.open(raw.table, version=before.result["raw_version"], row_id_sum=0)
    except LakeError as error:
        return f"fits anew in spite of features.refit: {error}"
    if not set(held.files) <= set(raw.files):
        return "fits anew in spite of features.refit: the ingested table was written anew"
    if any(snapshot.missing() for snapshot in snapshots.values()) or any(map(_is_gone, fitted.stored)):
        return "fits anew in spite of features.refit: what was fitted or written is gone"
    files = [Path(raw.table) / file.path for file in raw.files if file not in held.files]
    num = f"{len(files):,} of {len(raw.files):,}"
    return Kept(fitted, snapshots, files, why=f"keeps the fitted transform, reads the new files of the table ({num})")


def _is_gone(stored: Stored) -> bool:
    return not all(Path(path).is_file() for path in stored.paths())


def append_rows(spark: SparkSession, kept: Kept, raw: Snapshot, config: Config) -> dict[str, Snapshot]:
    """Transform the rows that came and commit them to the table of each split.

    A run that was killed left rows in some tables: they go first.

    Raises:
        DataError: A row does not fit the transform, or has the key of another.
    """
    every = read_table(spark, raw)
    rows = spark.read.schema(every.schema).parquet(*map(str, kept.files))
    table = feature_rows(with_split(rows, config), kept.fitted, kept.contract, config.split.names)
    num_rows = _checked(table, kept.contract, config.split.names)
    if config.source.key and _has_twins(table, kept.snapshots):
        check_keys(every, config.source.key)
    for snapshot in kept.snapshots.values():
        if current_version(Path(snapshot.table)) != snapshot.version:
            DeltaTable(snapshot.table).restore(snapshot.version)
    return write_features(table, num_rows, kept.contract, config, before=kept.snapshots)


def _checked(table: DataFrame, contract: Contract, splits: Sequence[str]) -> dict[str, int]:
    """Rows of each split; all of them fit."""
    asked = {f"rows {split}": F.col(TABLE) == place for place, split in enumerate(splits)}
    asked |= {f"bad {column.name}": _misfit(column) for column in contract.columns}
    asked["bad _split"] = F.col(TABLE).isNull()
    seen = table.agg(*[F.count_if(what).alias(name) for name, what in asked.items()]).first()
    assert seen is not None
    for name in asked:
        if name.startswith("bad ") and seen[name]:
            raise DataError(
                f"features: {name.removeprefix('bad ')}: wanted rows that the kept transform takes, seen {seen[name]:,} new "
                "ones with a missing value, a label outside its set, or a longer list than before; mend them, or set "
                "features.refit: true for a run"
            )
    return {split: seen[f"rows {split}"] for split in splits}


def _misfit(column: Column) -> SparkColumn:
    """Whether a row's value is not what the contract says."""
    value = F.col(column.name)
    if column.kind == "image" or not column.shape:
        return value.isNull()
    return value.isNull() | (F.size(value) != column.width) | F.exists(value, lambda x: x.isNull())


def _has_twins(table: DataFrame, snapshots: Mapping[str, Snapshot]) -> bool:
    """Whether a row has the row id of another, old or new."""
    new, spark = table.select("row_id"), table.sparkSession
    held = reduce(DataFrame.unionByName, [read_table(spark, s).select("row_id") for s in snapshots.values()])
    among = new.groupBy("row_id").count().where("count > 1").select("row_id")
    return not new.join(held, on="row_id", how="left_semi").unionByName(among).isEmpty()
