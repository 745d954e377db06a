"""Ingest: map raw files to a typed Delta table; rows that do not fit go to `<table>_rejects`.

accepted + rejected = read, always. The rows are written in one pass over the raw files, as files that belong to no table
yet; only where some were rejected does a second pass write those. What was written is looked at, and committed where it
is good, so that readers meet the last good version or the next one, whenever a run fails or is killed.
"""

import time
from collections.abc import Mapping, Sequence
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

from deltalake import DeltaTable
from pyspark.sql import DataFrame, Observation, SparkSession
from pyspark.sql import functions as F

from pipelines.card import Card, make_card
from pipelines.card_page import page
from pipelines.checks import check_age, check_rows, check_table, refuse, row_violations
from pipelines.config.data import Source
from pipelines.errors import DataError
from pipelines.growth import Ingested, Reading, drop_old_records, keep_record, plan_reading, without_files
from pipelines.joins import join_as_of, joined_tables
from pipelines.lake import UINT64, Snapshot, scratch_path, table_path
from pipelines.session import get_session
from pipelines.sources.files import raw_files, root_of
from pipelines.sources.parquet import undeclared
from pipelines.sources.schema import differences
from pipelines.stage import Given, Made
from pipelines.tables import current_version, pinned, read_table, staged

POSITION = ("_file", "_line")
_DRIFTED = 0.2  # a population stability index above it is told


def build(given: Given, *, now: float | None = None) -> Made:
    """Read the raw files, those that came or all, into the workload's `raw` table.

    Args:
        given: What the stage works from.
        now: Seconds since 1970 by which freshness is judged; the clock's by default.

    Raises:
        DataError: No rows, more rejected than `source.max_rejected` allows, or a constraint is broken that fails; the
            rejects are written first, and the table stays as it is.
    """
    source, table = given.config.source, table_path(given.config.workload, "raw")
    now = time.time() if now is None else now
    reading = plan_reading(source, table, given.made_from)
    lines = [reading.why, *_schema_lines(source, reading)]
    if reading.files:
        ingested, reasons = _read(given, reading, table, now=now)
        lines += [_sum_line(reading, ingested), *reasons]
    else:  # a run was killed behind its commit, or the rows have grown old
        assert reading.last
        ingested = reading.last
        _show_card(given, ingested.card)
        refuse(check_age(source.checks, _newest(source, ingested.card), now=now))
    newest = _newest(source, ingested.card)
    found = [*ingested.violations, *check_age(source.checks, newest, now=now)]
    snapshot = pinned(table, ingested.rows, ingested.row_id_sum)
    given.run.metrics({**_counts(ingested), **{f"violations.{v.name}": v.num for v in found}})
    given.run.dataset(snapshot, name="raw", context="ingested")
    return Made(
        rows=snapshot.rows,
        result={
            "snapshot": snapshot.model_dump(mode="json"),
            **_counts(ingested),
            "rejects": str(table_path(given.config.workload, "raw_rejects")),
            "violations": {violation.name: violation.num for violation in ingested.violations},
            "newest": newest,
            "joins": joined_tables(source.joins),
        },
        outputs=[str(path) for path in snapshot.paths()],
        lines=[*lines, *map(str, found), *_drift_lines(ingested.card)],
    )


def parse(spark: SparkSession, source: Source, files: Mapping[str, Sequence[Path]] | None = None) -> DataFrame:
    """All rows of raw files, accepted or not, with `row_id`, position and, where given, `_split`.

    `row_id` is xxhash64 of the key: the columns of `source.key`, or (relative path, line number).

    Args:
        spark: The session.
        source: The raw files and what a row looks like.
        files: Those to read, by split; all of the source's by default.
    """
    module = import_module(source_module(source))
    parts = []
    for split, group in (raw_files(source) if files is None else files).items():
        part: DataFrame = module.read(spark, source, group, root_of(source))
        parts.append(part.withColumn("_split", F.lit(split)) if split else part)
    rows = reduce(DataFrame.unionByName, parts)
    null_key = [F.when(F.col(name).isNull(), F.lit(f"{name}: wanted a key, seen null")) for name in source.key]
    return rows.withColumns(
        {
            "row_id": F.xxhash64(*(source.key or POSITION)),
            "_reason": F.coalesce("_reason", *null_key),
        }
    )


def source_module(source: Source) -> str:
    """The module that reads the source's format."""
    return f"pipelines.sources.{source.format}"


def _read(given: Given, reading: Reading, table: Path, *, now: float) -> tuple[Ingested, list[str]]:
    """Read, look and commit. Returns what the table holds then, and why some rows were rejected."""
    source, spark = given.config.source, get_session(given.config)
    scratch = scratch_path(given.config.workload)
    parsed = parse(spark, source, reading.files)
    columns = [name for name in parsed.columns if name not in ("_raw", "_reason")]
    checked, counts = check_rows(parsed, source.checks)
    fits, seen = F.col("_reason").isNull(), Observation()
    row_id = F.when(fits, F.col("row_id").cast("decimal(20,0)"))
    asked = {"rows": F.count(F.lit(1)), "accepted": F.count_if(fits), "row_id_sum": F.sum(row_id), **counts}
    observed = checked.observe(seen, *[value.alias(name) for name, value in asked.items()])
    accepted = join_as_of(observed.where(fits).select(*columns), source)
    with staged(accepted, scratch=scratch, what="ingest") as files:
        rejects, counted = table_path(given.config.workload, "raw_rejects"), seen.get
        rejected = counted["rows"] - counted["accepted"]
        reasons = _write_rejects(checked, rejects, reading, rejected, scratch=scratch)
        came = spark.read.parquet(str(files.folder))
        last = reading.base.card if reading.base else None
        card = make_card(came, source.ingested, num_bytes=reading.num_bytes, last=last)
        ingested = _summed_up(given, reading, counted, card, rejects_version=current_version(rejects))
        _show_card(given, ingested.card)
        refuse(ingested.violations)
        _refuse_rows(source, ingested, rejects, reasons)
        before = [read_table(spark, Snapshot.open(table, row_id_sum=0))] if reading.base else []
        rows_before = reading.last.rows if reading.last else None
        found = check_table(source.checks, [came, *before], num=ingested.rows, num_before=rows_before)
        refuse([*found, *check_age(source.checks, _newest(source, ingested.card), now=now)])
        ingested = ingested.model_copy(update={"violations": (*ingested.violations, *found)})
        metadata = keep_record(table, ingested)
        files.commit(table, mode="append" if reading.base else "overwrite", metadata=metadata)
        drop_old_records(table, metadata)
    return ingested, reasons


def _write_rejects(rows: DataFrame, path: Path, reading: Reading, num: int, *, scratch: Path) -> list[str]:
    """Bring the reject table to what belongs to the rows, and say of some new ones why they were rejected.

    A run that failed or was killed left rejects without rows: they go.
    """
    kept, there = reading.base.rejects_version if reading.base else None, current_version(path)
    if kept is not None and kept != there:
        DeltaTable(str(path)).restore(kept)
    if not num and (kept is not None or there is None):
        return []
    columns = [*POSITION, "_raw", "_reason", "row_id"]
    rejected = rows.where(F.col("_reason").isNotNull()).select(columns)
    with staged(rejected if num else rejected.limit(0), scratch=scratch, what="rejects") as files:
        written = rows.sparkSession.read.parquet(str(files.folder))
        examples = written.orderBy(*POSITION).limit(3).collect()
        files.commit(path, mode="append" if kept is not None else "overwrite", metadata={})
    return [f"rejected {row['_file']} line {row['_line']}: {row['_reason']}" for row in examples]


def _summed_up(
    given: Given, reading: Reading, seen: Mapping[str, Any], card: Card, *, rejects_version: int | None
) -> Ingested:
    """What the table holds with the rows that came; its violations are those of the constraints of a row."""
    source, base = given.config.source, reading.base
    if reading.last:
        card_now = base.card.followed_by(card) if base else card
        card = card_now.model_copy(update={"drift": card.drift_from(reading.last.card)})
    return Ingested(
        made_from=without_files(given.made_from),
        files=reading.marks,
        columns=source.columns,
        rows_read=seen["rows"] + (base.rows_read if base else 0),
        rows_rejected=seen["rows"] - seen["accepted"] + (base.rows_rejected if base else 0),
        row_id_sum=(int(seen["row_id_sum"] or 0) + (base.row_id_sum if base else 0)) % UINT64,
        rejects_version=rejects_version,
        violations=row_violations(source.checks, seen, base.violations if base else ()),
        card=card,
    )


def _refuse_rows(source: Source, ingested: Ingested, rejects: Path, reasons: list[str]) -> None:
    read, rejected = ingested.rows_read, ingested.rows_rejected
    if not read:
        paths = [str(file) for files in raw_files(source).values() for file in files]
        raise DataError(f"source.paths: wanted rows in {', '.join(paths)}, seen none: the files are empty")
    if rejected == read or rejected > source.max_rejected * read:
        raise DataError(
            f"ingest: {rejected:,} of {read:,} rows do not fit the schema or source.checks, source.max_rejected allows "
            f"{source.max_rejected:g}; {reasons[0] if reasons else ''}; all of them: {rejects}; mend the rows, the schema, "
            "the constraints or the limit"
        )


def _show_card(given: Given, card: Card) -> None:
    """Put the card beside the run, also where the rows are then refused."""
    given.run.text("card.html", page(card, title=given.config.workload))
    given.run.json("card.json", card.model_dump(mode="json", exclude={"columns": {"__all__": {"sketch"}}}))
    given.run.metrics({f"psi.{drift.name}": drift.psi for drift in card.drift if drift.psi is not None})


def _counts(ingested: Ingested) -> dict[str, int]:
    return {
        "rows_read": ingested.rows_read,
        "rows_accepted": ingested.rows,
        "rows_rejected": ingested.rows_rejected,
    }


def _newest(source: Source, card: Card) -> dict[str, float | None]:
    """The newest value, in seconds since 1970, of each column that is watched for its age."""
    return {name: card[name].max for check in source.checks if check.freshness for name in check.columns}


def _sum_line(reading: Reading, ingested: Ingested) -> str:
    before = _counts(reading.base) if reading.base else {}
    read, accepted, rejected = (num - before.get(key, 0) for key, num in _counts(ingested).items())
    total = f"; the table holds {ingested.rows:,}" if reading.base else ""
    return f"{read:,} rows read, {accepted:,} accepted, {rejected:,} rejected{total}"


def _schema_lines(source: Source, reading: Reading) -> list[str]:
    """What the declared columns have otherwise than those of the version before, and what files have beside them."""
    lines = []
    if reading.last and (changes := differences(reading.last.columns, source.columns)):
        lines.append(f"schema since the version before: {', '.join(changes)}")
    if source.format in ("parquet", "delta"):
        lines += undeclared([file for group in reading.files.values() for file in group], source.columns)
    return lines


def _drift_lines(card: Card) -> list[str]:
    moved = sorted((d for d in card.drift if d.psi and d.psi > _DRIFTED), key=lambda d: -(d.psi or 0))
    if not moved:
        return []
    shown = ", ".join(f"{drift.name} {drift.psi:.2f}" for drift in moved[:5])
    return [f"drift against the version before (PSI): {shown}{f' and {len(moved) - 5} more' if len(moved) > 5 else ''}"]
