"""The feature tables, one a split: what a row becomes, and writing them in one pass."""

from collections.abc import Mapping, Sequence

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from pipelines.config import Config
from pipelines.errors import DataError
from pipelines.features.apply import pad_sparse, transform, with_label
from pipelines.features.fitted import FittedFeatures
from pipelines.features.layout import lay_out_tables
from pipelines.lake import CONTRACT_KEY, Contract, Snapshot, scratch_path, table_path
from pipelines.tables import TABLE, write_tables


def feature_rows(rows: DataFrame, fitted: FittedFeatures, contract: Contract, splits: Sequence[str]) -> DataFrame:
    """The contract's columns, and `TABLE`: the place of the row's split.

    Args:
        rows: Raw rows with `_split`.
        fitted: The transform, fitted on rows of train.
        contract: Of the tables; its sparse inputs say how long lists become.
        splits: In the order of their tables.
    """
    table = with_label(rows, fitted.label)
    table = transform(table, fitted, keep=["row_id", "label", "_split"], fitted_on=F.col("_split") == "train")
    table = pad_sparse(table, {c.input: c.width for c in contract.columns if c.kind == "sparse_ids"})
    place = F.array_position(F.array(*map(F.lit, splits)), F.col("_split")).cast("int") - 1
    return table.select(*[column.name for column in contract.columns], place.alias(TABLE))


def write_features(
    table: DataFrame,
    num_rows: Mapping[str, int],
    contract: Contract,
    config: Config,
    *,
    before: Mapping[str, Snapshot] | None = None,
) -> dict[str, Snapshot]:
    """Write the table of each split, all in one pass.

    Args:
        table: See `feature_rows`.
        num_rows: Rows of each split, about.
        contract: Of the tables.
        config: The workload.
        before: The tables to which the rows come; they take the place of what is there by default.
    """
    splits, layout = config.split.names, config.features.layout
    row_bytes = sum(column.bytes_per_row for column in contract.columns)
    sizes = [num_rows[split] * row_bytes for split in splits]
    snapshots = write_tables(
        lay_out_tables(table, sizes, shard_mb=layout.shard_mb, seed=config.seed),
        [table_path(config.workload, f"features/{split}") for split in splits],
        before=[before[split] for split in splits] if before else [],
        scratch=scratch_path(config.workload),
        what="features: write",
        metadata={CONTRACT_KEY: contract.model_dump(mode="json")},
        compression=layout.compression,
    )
    return dict(zip(splits, snapshots, strict=True))


def check_keys(rows: DataFrame, key: Sequence[str]) -> None:
    """Refuse two rows with one key; a collision of two hashes does no harm.

    Raises:
        DataError: With some of them.
    """
    twice = rows.groupBy(*key).count().where("count > 1")
    found = twice.orderBy(*key).limit(3).collect()
    if found:
        shown = "; ".join(", ".join(f"{name}={row[name]}" for name in key) + f" ({row['count']} rows)" for row in found)
        raise DataError(f"source.key: wanted one row a key, seen {shown}; mend the rows, or name more columns")
