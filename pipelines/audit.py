"""Audit: what trained a run, derived again from the table; and which registered models saw a row."""

from dataclasses import dataclass

from pipelines import tracking
from pipelines.config import Config
from pipelines.errors import ConfigError, LakeError, one_line
from pipelines.ingest import POSITION
from pipelines.lake import Snapshot, receipt_path
from pipelines.lake.row_ids import read_row_ids
from pipelines.receipt import read_receipt
from pipelines.session import get_session
from pipelines.tracking import Registered

_PREFIX = "headrace.training."


@dataclass(frozen=True)
class Audit:
    """What trained a run.

    Attributes:
        snapshot: The table at the version that the run names, opened and summed anew.
        epochs: `rows` and `row_id_sum` of each epoch, by the run's receipt.
        differences: What does not agree; empty where every row is accounted for.
    """

    run_id: str
    snapshot: Snapshot
    epochs: list[tuple[int, int]]
    differences: list[str]


def audit_run(run_id: str) -> Audit:
    """Derive again from a run which table, version, files and rows trained it.

    Args:
        run_id: Of the train stage, or of the pipeline run above it.

    Raises:
        LakeError: The table or the version is gone.
        TrackingError: MLflow knows no such run, or it trained nothing.
    """
    record = tracking.training_record(run_id)
    tags = {name.removeprefix(_PREFIX): value for name, value in record.tags.items() if name.startswith(_PREFIX)}
    snapshot = Snapshot.open(tags["delta_path"], version=int(tags["delta_version"]))
    result = (record.receipt or {}).get("result", {})
    epochs = [(int(epoch["rows"]), int(epoch["row_id_sum"])) for epoch in result.get("epochs", [])]
    differences = []
    for name, seen in (("file_digest", snapshot.digest), ("row_digest", snapshot.row_digest)):
        if tags[name] != seen:
            differences.append(f"{name}: the run recorded {tags[name]}, the table has {seen}")
    if not epochs:
        differences.append("the run left no receipt: it did not end, or fitted a model without epochs")
    for number, (rows, row_id_sum) in enumerate(epochs):
        if (rows, row_id_sum) != (snapshot.rows, snapshot.row_id_sum):
            differences.append(
                f"epoch {number + 1}: {rows:,} rows with row_id sum {row_id_sum:#018x}, the table has {snapshot.rows:,} "
                f"with {snapshot.row_id_sum:#018x}"
            )
    return Audit(record.run_id, snapshot, epochs, differences)


def as_text(audit: Audit) -> str:
    """The audit as lines that a user reads."""
    snapshot = audit.snapshot
    lines = [
        f"run     {audit.run_id}",
        f"table   {snapshot.table} version {snapshot.version}, {len(snapshot.files)} files, digest {snapshot.digest[:16]}",
        f"rows    {snapshot.rows:,} with row_id sum {snapshot.row_id_sum:#018x}, summed anew from the files",
        f"epochs  {len(audit.epochs)}, by the run's receipt",
    ]
    agreed = "every epoch trained on each of these rows once"
    return "\n".join([*lines, *(audit.differences or [agreed])])


@dataclass(frozen=True)
class Sighting:
    """Whether a registered model saw a row; None where its training table is gone, so that nobody can say."""

    version: Registered
    saw: bool | None
    note: str


@dataclass(frozen=True)
class RowAudit:
    """Which registered models saw a row.

    Attributes:
        is_raw: Whether the workload's ingested table holds it now; None where there is none.
    """

    row_id: int
    is_raw: bool | None
    sightings: list[Sighting]


def audit_row(config: Config, key: str) -> RowAudit:
    """Which registered models of the workload saw a row in training.

    Args:
        config: The workload.
        key: Values of `source.key` in order, separated by commas; without one `file:line`; or `row_id=NUMBER`.

    Returns:
        Each version, newest first.

    Raises:
        ConfigError: `key` does not fit the workload's key.
    """
    row_id = _row_id(config, key)
    ingested = read_receipt(receipt_path(config.workload, "ingest"))
    is_raw = None
    if ingested is not None:
        is_raw = _holds(Snapshot.model_validate(ingested.result["snapshot"]), row_id)
    sightings = [_sighting(version, row_id) for version in tracking.versions(config.workload)]
    return RowAudit(row_id, is_raw, sightings)


def _sighting(version: Registered, row_id: int) -> Sighting:
    table, number = version.tags["headrace.delta_path"], int(version.tags["headrace.delta_version"])
    where = f"{table} version {number}"
    try:
        snapshot = Snapshot.open(table, version=number, row_id_sum=0)
    except LakeError as error:
        return Sighting(version, None, one_line(str(error), limit=200))
    return Sighting(version, _holds(snapshot, row_id), where)


def _holds(snapshot: Snapshot, row_id: int) -> bool:
    return any((read_row_ids(path) == row_id).any() for path in snapshot.paths())


def _row_id(config: Config, key: str) -> int:
    """xxhash64 of the key as `ingest` takes it, by Spark itself."""
    if key.startswith("row_id="):
        return int(key.removeprefix("row_id="))
    names = config.source.key or list(POSITION)
    values = key.split(",") if config.source.key else key.rsplit(":", 1)
    if len(values) != len(names):
        wanted = ",".join(names) if config.source.key else "FILE:LINE"
        raise ConfigError(f"ROW: wanted {wanted} or row_id=NUMBER, seen {key!r}")
    from pyspark.sql import functions as F

    spark = get_session(config, keeps_events=False)  # `make profile` is of the stages
    kinds = {**config.source.columns, **dict(zip(POSITION, ("string", "bigint"), strict=True))}
    row = spark.createDataFrame([tuple(values)], ", ".join(f"`{name}` string" for name in names))
    found = row.select(F.xxhash64(*[F.col(name).cast(kinds[name]) for name in names])).first()
    assert found is not None
    return int(found[0])


def text_of(audit: RowAudit) -> str:
    """The sightings as lines that a user reads."""
    answer = {True: "saw it", False: "did not see it", None: "cannot be said"}
    there = {True: "is there", False: "is not there: deleted since, or its key is mistyped", None: "was never made"}
    lines = [f"row_id     {audit.row_id}", f"raw table  {there[audit.is_raw]}"]
    for sighting in audit.sightings:
        version = sighting.version
        lines.append(f"version {version.version}  {version.ref.name} {answer[sighting.saw]}; {sighting.note}")
    return "\n".join(lines if audit.sightings else [*lines, "no model is registered"])
