"""`make plan`: what a training run will do, before it does, and what stands in its way."""

import re
import subprocess
import sys

import psutil
from deltalake import DeltaTable
from pydantic import BaseModel, ConfigDict

from pipelines.config import Config
from pipelines.errors import ConfigError, HeadraceError, LakeError, Refused, one_line
from pipelines.features.fitted import FittedFeatures
from pipelines.lake import Snapshot, receipt_path, scratch_path
from pipelines.lake.columns import columns_of
from pipelines.lake.snapshot import rewrite_command
from pipelines.lake.traps import traps_of
from pipelines.receipt import read_receipt, write_json
from pipelines.stream.forecast import Forecast, forecast
from pipelines.train.job import Probed, TrainJob

PROBE_S = 3.0
PROBE_TIMEOUT_S = 120


class Rates(BaseModel):
    """What was measured.

    Attributes:
        rows_per_s: Over all ranks.
        base_mb: A rank's memory before it reads.
        source: Where the figures come from.
    """

    model_config = ConfigDict(frozen=True)

    rows_per_s: float
    base_mb: float
    source: str


class DryRun(BaseModel):
    """The plan of a training run.

    Attributes:
        forecast: By groups of lanes; a rank has one of its own, unless ranks share its rows or take turns at it.
        ranks: How many.
        memory_mb: Predicted peak of a rank.
        retention_s: How long the table keeps the files of a version that is overwritten.
        refusals: What must be mended first, each with the command that does.
        remarks: What of the settings has no use.
    """

    model_config = ConfigDict(frozen=True)

    table: str
    version: int
    files: int
    row_groups: int
    bytes: int
    forecast: Forecast
    ranks: int
    strategy: str
    memory_mb: float
    memory_limit_mb: float
    epoch_s: float
    epochs: int
    rates: Rates
    retention_s: float
    refusals: list[str]
    remarks: list[str]


def pinned(config: Config) -> Snapshot:
    """The Snapshot that training would read, by the receipt of `features`; opened anew, so that it is as it was.

    Raises:
        LakeError: There is no receipt, or the table is no longer what the receipt says.
    """
    receipt = read_receipt(receipt_path(config.workload, "features"))
    if receipt is None:
        raise LakeError(
            f"{config.workload}: wanted the receipt of features, seen none; run `make features W={config.workload}`"
        )
    wanted = Snapshot.model_validate(receipt.result["snapshots"]["train"])
    try:
        seen = Snapshot.open(wanted.table, version=wanted.version, row_id_sum=wanted.row_id_sum)
    except LakeError as error:
        raise Refused(f"{error}; or write it again: make features W={config.workload}") from None
    if seen.digest != wanted.digest:
        raise Refused(
            f"{wanted.table} version {wanted.version}: not the files that the receipt of features names; write it again: "
            f"make features W={config.workload}"
        )
    return wanted


def dry_run(config: Config, snapshot: Snapshot) -> DryRun:
    """Plan the config's training over a Snapshot.

    Raises:
        ConfigError: The workload trains no network.
        Refused: A column cannot be streamed at all, so that nothing can be planned.
    """
    if config.model is None:
        raise ConfigError(f"{config.workload}: wanted a section `model`, seen none; there is nothing to plan")
    config = _as_tuned(config)
    refusals = [str(trap) for trap in traps_of(snapshot)]
    if refusals:
        raise Refused("\n".join(refusals))
    columns = columns_of(snapshot)
    found = forecast(snapshot, columns, config.train, seed=config.seed)
    rates = _rates(config, snapshot)
    epoch_s = found.rows / rates.rows_per_s
    memory_mb = rates.base_mb + max(rank.held_bytes for rank in found.ranks) / 1e6
    limit_mb = config.train.memory_mb or psutil.virtual_memory().available / 1e6 / config.train.ranks
    retention_s = _retention_s(snapshot)
    if memory_mb > limit_mb:
        refusals.append(
            f"a rank needs {memory_mb:,.0f} MB, of {limit_mb:,.0f} MB: row groups of {found.largest_row_group / 1e6:,.0f} "
            f"MB, {config.train.window} a window; {rewrite_command(snapshot.table)} with --file-mb 8, or --set train.window=1"
        )
    if epoch_s * config.train.epochs > retention_s:
        refusals.append(
            f"the run takes {_hours(epoch_s * config.train.epochs)}, but the table keeps overwritten files for "
            f"{_hours(retention_s)}; in Spark: ALTER TABLE delta.`{snapshot.table}` SET TBLPROPERTIES "
            "('delta.deletedFileRetentionDuration' = 'interval 30 days')"
        )
    return DryRun(
        table=snapshot.table,
        version=snapshot.version,
        files=len(snapshot.files),
        row_groups=sum(len(file.row_groups) for file in snapshot.files),
        bytes=sum(file.bytes for file in snapshot.files),
        forecast=found,
        ranks=config.train.ranks,
        strategy=config.train.strategy.name,
        memory_mb=memory_mb,
        memory_limit_mb=limit_mb,
        epoch_s=epoch_s,
        epochs=config.train.epochs,
        rates=rates,
        retention_s=retention_s,
        refusals=refusals,
        remarks=config.train.remarks(found.steps),
    )


def _as_tuned(config: Config) -> Config:
    """With the parameters that the tune stage found, as training takes them."""
    receipt = read_receipt(receipt_path(config.workload, "tune")) if config.tune else None
    return config.tuned(receipt.result["best"]) if receipt else config


def _rates(config: Config, snapshot: Snapshot) -> Rates:
    """Those of the last run on this table, or of a probe."""
    receipt = read_receipt(receipt_path(config.workload, "train"))
    if (
        receipt is not None
        and receipt.result["model"]["snapshot"] == snapshot.digest
        and receipt.result.get("strategy")
    ):
        epochs = sorted(epoch["rows_per_s"] for epoch in receipt.result["epochs"])
        how = f"{receipt.result['strategy']} on {receipt.result['ranks']} ranks"
        return Rates(
            rows_per_s=epochs[len(epochs) // 2], base_mb=receipt.result["base_mb"], source=f"the last run, {how}"
        )
    return _probe(config, snapshot)


def _probe(config: Config, snapshot: Snapshot) -> Rates:
    assert config.model is not None
    features = read_receipt(receipt_path(config.workload, "features"))
    if features is None or snapshot.contract is None:
        raise LakeError(
            f"{snapshot.table}: wanted a table of the features stage, whose network can be tried for {PROBE_S:g} s, seen "
            "none; use LaneLoader on it in a loop of your own (README)"
        )
    job = TrainJob(
        workload=config.workload,
        folder=scratch_path(config.workload) / "probe",
        model=config.model,
        train=config.train,
        seed=config.seed,
        snapshot=snapshot,
        validation=None,
        fitted=FittedFeatures.model_validate(features.result["fitted"]),
        tracking_uri="",
        run_id="",
        keep_checkpoints=1,
    )
    write_json(job.path, job)
    command = [sys.executable, "-m", "pipelines.train.probe", str(job.path), str(PROBE_S)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
    if done.returncode:
        raise HeadraceError(f"plan: the probe of {PROBE_S:g} s failed: {one_line(done.stderr[-400:])}")
    probed = Probed.model_validate_json(done.stdout.splitlines()[-1])
    together = min(config.train.ranks, psutil.cpu_count() or 1)
    return Rates(
        rows_per_s=probed.rows_per_s * together,
        base_mb=probed.base_mb,
        source=f"a probe of {PROBE_S:g} s on one rank, times {together}",
    )


_UNITS = {"minute": 60.0, "hour": 3600.0, "day": 86400.0, "week": 7 * 86400.0}
_DEFAULT_RETENTION_S = 7 * 86400.0  # Delta's own


def _retention_s(snapshot: Snapshot) -> float:
    value = DeltaTable(snapshot.table).metadata().configuration.get("delta.deletedFileRetentionDuration", "")
    found = re.fullmatch(r"(?:interval )?(\d+) (minute|hour|day|week)s?", value.strip())
    return float(found.group(1)) * _UNITS[found.group(2)] if found else _DEFAULT_RETENTION_S


def _hours(seconds: float) -> str:
    return (
        f"{seconds:,.1f} s"
        if seconds < 120
        else f"{seconds / 60:,.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:,.0f} h"
    )


def as_text(plan: DryRun) -> str:
    """The plan as lines that a user reads."""
    found, mb = plan.forecast, 1e6
    part = "rank" if len(found.ranks) == plan.ranks else "group"
    low, high = found.lane_rows
    lines = [
        f"table      {plan.table} version {plan.version}: {found.rows:,} rows in {plan.row_groups} row groups of "
        f"{plan.files} files, {plan.bytes / mb:,.1f} MB",
        f"ranks      {plan.ranks}, {plan.strategy}",
        f"an epoch   {found.steps:,} steps; lanes of {low:,} to {high:,} rows",
        "",
        f"{part:>5} lanes     files  row groups       rows  MB of rows   MB read",
    ]
    for number, rank in enumerate(found.ranks):
        lanes = f"{rank.lanes[0]} to {rank.lanes[-1]}"
        lines.append(
            f"{number:>5} {lanes:<8} {rank.files:>6} {rank.row_groups:>11} {rank.rows:>10,} {rank.bytes / mb:>11,.1f} "
            f"{rank.read_bytes / mb:>9,.1f}"
        )
    read = sum(rank.read_bytes for rank in found.ranks)
    lines += [
        "",
        f"imbalance  {found.imbalance:.3f} (rows of the fullest {part} over the mean)",
        f"read       {read / max(plan.bytes, 1):.2f} times the table: a row group on a boundary of {part}s is read by both",
        f"memory     {plan.memory_mb:,.0f} MB a rank at its peak, of {plan.memory_limit_mb:,.0f} MB",
        f"time       {_hours(plan.epoch_s)} an epoch, {_hours(plan.epoch_s * plan.epochs)} for {plan.epochs} (by "
        f"{plan.rates.source}: {plan.rates.rows_per_s:,.0f} rows/s)",
        f"retention  overwritten files stay for {_hours(plan.retention_s)}",
        *(f"note       {remark}" for remark in plan.remarks),
    ]
    return "\n".join(lines)
