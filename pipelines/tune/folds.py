"""What the trials of a candidate are trained and measured on: the validation split, or parts of the training split.

Features stay fitted on the whole training split. The parts are those of target encoding's own folds, so that with as
many of them no row's encoding holds a label of its part.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from pipelines.classic import FIT_LEVEL
from pipelines.config import Config
from pipelines.features.apply import fold
from pipelines.features.layout import lay_out_tables
from pipelines.lake import CONTRACT_KEY, UINT64, Snapshot, scratch_path
from pipelines.tables import TABLE, kept, read_table, write_tables

_FOLD = "_fold"


@dataclass(frozen=True)
class Pair:
    """Rows to fit on, and rows to measure on."""

    fit: DataFrame
    measure: DataFrame


@contextmanager
def kept_pairs(train: DataFrame, validation: DataFrame | None, *, folds: int | None, seed: int) -> Iterator[list[Pair]]:
    """The pairs of rows, kept for the time of the body.

    Args:
        train: Rows of the training split, with `row_id`.
        validation: Rows of the validation split; None where there are folds.
        folds: How many parts the training split has, or None.
        seed: Of the parts.
    """
    parts = train.withColumn(_FOLD, fold(folds, seed)) if folds else train
    with ExitStack() as stack:
        tables = [stack.enter_context(kept(rows, level=FIT_LEVEL)) for rows in (parts, validation) if rows is not None]
        if folds:
            held = [F.col(_FOLD) == number for number in range(folds)]
            yield [Pair(tables[0].where(~out), tables[0].where(out)) for out in held]
        else:
            yield [Pair(*tables)]


@contextmanager
def fold_tables(spark: SparkSession, train: Snapshot, config: Config, *, folds: int) -> Iterator[list[Snapshot]]:
    """A table of each part of the training table, laid out as it is, for the time of the body."""
    contract = train.contract
    assert contract is not None, "a feature table carries its contract"
    scratch = scratch_path(config.workload)
    folder, layout = Path(mkdtemp(dir=scratch, prefix="folds-")), config.features.layout
    row_bytes = sum(column.bytes_per_row for column in contract.columns)
    rows = read_table(spark, train).withColumn(TABLE, fold(folds, config.seed))
    sizes = [train.rows / folds * row_bytes] * folds
    try:
        yield write_tables(
            lay_out_tables(rows, sizes, shard_mb=layout.shard_mb, seed=config.seed),
            [folder / str(number) for number in range(folds)],
            scratch=scratch,
            what="tune: write folds",
            metadata={CONTRACT_KEY: contract.model_dump(mode="json")},
            compression=layout.compression,
        )
    finally:
        rmtree(folder, ignore_errors=True)


def together(tables: Sequence[Snapshot]) -> Snapshot:
    """Several tables that lie in one folder, as one Snapshot of all their files; nothing is written."""
    folder = Path(tables[0].table).parent
    files = [
        file.model_copy(update={"path": f"{Path(table.table).name}/{file.path}"})
        for table in tables
        for file in table.files
    ]
    return tables[0].model_copy(
        update={
            "table": str(folder),
            "files": tuple(sorted(files, key=lambda file: file.path)),
            "rows": sum(table.rows for table in tables),
            "row_id_sum": sum(table.row_id_sum for table in tables) % UINT64,
        }
    )
