"""The stages of a workload: which there are, whether one is up to date, and running it."""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from pipelines import tracking
from pipelines.config import Config
from pipelines.config.checks import Reference
from pipelines.config.data import Table
from pipelines.errors import ConfigError, LakeError
from pipelines.lake import receipt_path, runs_path, scratch_path
from pipelines.progress import say
from pipelines.receipt import Receipt, changed, digest_of, files_digest, modules_digest, read_receipt, write_json
from pipelines.sources.files import named_files, raw_files, root_of
from pipelines.sources.prepare import prepare
from pipelines.stage import Given


@dataclass(frozen=True)
class Stage:
    """A stage: its function as `module:name`, the config keys that it reads, the stages before it."""

    build: str
    reads: tuple[str, ...]
    after: tuple[str, ...] = ()


STAGES = {
    "ingest": Stage("pipelines.ingest:build", ("source",)),
    "features": Stage(
        "pipelines.features.build:build",
        ("source.schema", "source.key", "split", "features", "recommend.user", "recommend.item", "seed"),
        ("ingest",),
    ),
    "mine": Stage("pipelines.mine:build", ("mine",), ("ingest", "features")),
    "tune": Stage(
        "pipelines.tune.build:build",
        ("tune", "classic", "model", "train", "class_weights", "gate.metric", "seed"),
        ("features",),
    ),
    "classic": Stage("pipelines.classic:build", ("classic", "class_weights", "seed"), ("features", "tune")),
    "train": Stage("pipelines.train.launch:build", ("model", "class_weights", "train", "seed"), ("features", "tune")),
    "evaluate": Stage(
        "pipelines.evaluate:build", ("split", "gate", "recommend", "seed"), ("ingest", "features", "classic", "train")
    ),
    "register": Stage("pipelines.register:build", (), ("features", "evaluate")),
    "score": Stage("pipelines.score:build", ("score", "split", "recommend", "seed"), ("ingest", "features")),
}


def declared(config: Config) -> list[str]:
    """The stages that the config declares, in order."""
    left_out = {
        "mine": config.mine is None,
        "tune": config.tune is None,
        "classic": not config.classic,
        "train": config.model is None,
        **dict.fromkeys(("evaluate", "register", "score"), not config.candidates),
    }
    return [name for name in STAGES if not left_out.get(name, False)]


def run_stages(config: Config, names: Sequence[str]) -> dict[str, Receipt]:
    """Run the named stages in order; one that is up to date is skipped, and said to be.

    Returns:
        The receipt of each.

    Raises:
        ConfigError: The config does not declare a stage.
        HeadraceError: A stage failed or refused; receipts of the stages before it stand.
    """
    if missing := [name for name in names if name not in declared(config)]:
        models = "`classic` or `model`"
        sections = {"train": "`model`", "evaluate": models, "register": models, "score": models}
        section = sections.get(missing[0], f"`{missing[0]}`")
        raise ConfigError(f"{config.workload}: {missing[0]}: wanted a section {section} in the config, seen none")
    done: dict[str, Receipt] = {}
    with only_one(config.workload), _Parent(config, single=len(names) == 1) as parent:
        shutil.rmtree(scratch_path(config.workload))
        for name in names:
            done[name] = _run_stage(config, name, parent)
    return done


def _run_stage(config: Config, name: str, parent: "_Parent") -> Receipt:
    stage = STAGES[name]
    if name == "ingest":
        prepare(config)
    inputs = _inputs(config, name)
    if tuned := inputs.pop("tune", None):  # what it found stands in the stage's own sections, whose digests tell of it
        config = config.tuned(tuned.result["best"])
    made_from = depends_on(config, name, inputs)
    digest = digest_of(made_from)
    path = receipt_path(config.workload, name)
    before = read_receipt(path)
    why = _why_run(before, made_from) or (_why_stale(config, before) if name == "ingest" and before else "")
    if before and not why:
        say(f"{name:<9} up to date ({before.seconds:.1f} s when it ran)")
        return before
    say(f"{name:<9} runs{': ' + why if before else ''}")
    started = time.monotonic()
    module, _, function = stage.build.partition(":")
    with parent.stage(name) as run:
        run.tags({"headrace.digest": digest})
        given = Given(config=config, inputs=inputs, run=run, made_from=made_from)
        made = getattr(import_module(module), function)(given)
        receipt = Receipt(
            stage=name,
            workload=config.workload,
            digest=digest,
            made_from=made_from,
            seconds=round(time.monotonic() - started, 3),
            rows=made.rows,
            result=made.result,
            outputs={output: _size_of(output) for output in made.outputs},
            ended_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            run_id=run.id,
        )
        run.metrics({"seconds": receipt.seconds, "rows": receipt.rows})
        run.json("receipt.json", receipt.model_dump(mode="json"))
        write_json(path, receipt)
    for line in made.lines:
        say(f"          {line}")
    say(f"{name:<9} done in {receipt.seconds:.1f} s")
    return receipt


def _inputs(config: Config, name: str) -> dict[str, Receipt]:
    found = {}
    for other in STAGES[name].after:
        if other not in declared(config):
            continue
        receipt = read_receipt(receipt_path(config.workload, other))
        if receipt is None:
            raise LakeError(
                f"{name}: wanted the receipt of {other} at {receipt_path(config.workload, other)}, seen none; run "
                f"`make {other} W={config.workload}` first"
            )
        found[other] = receipt
    return found


def depends_on(config: Config, name: str, inputs: dict[str, Receipt]) -> dict[str, str]:
    """Everything that the stage depends on, by part."""
    stage = STAGES[name]
    values = config.model_dump(mode="json", by_alias=True)
    reads = [*stage.reads, *(["source"] if name == "score" and config.score.paths else [])]
    parts = {f"config {key}": digest_of(reduce(lambda at, k: at and at[k], key.split("."), values)) for key in reads}
    parts |= {f"input {other}": receipt.identity for other, receipt in inputs.items()}
    modules = [stage.build.partition(":")[0], *_named_modules(config, name)]
    parts |= {f"module {module}": sha for module, sha in modules_digest(modules).items()}
    if name == "ingest" or (name == "score" and config.score.paths):
        source = config.source.model_copy(update={"paths": config.score.paths} if name == "score" else {})
        parts["raw files"] = _files_digest(source)
        if joins := source.joins:
            parts["joined files"] = digest_of([_files_digest(join.table) for join in joins])
    if name == "ingest":
        references = [check.reference for check in config.source.checks if check.reference]
        parts |= {f"reference {reference.table}": _reference_digest(reference) for reference in references}
    if name in ("evaluate", "score"):
        champion = tracking.champion(config.workload, alias=config.score.alias if name == "score" else "champion")
        parts["champion"] = f"version {champion.version}" if champion else "none"
    return parts


def _named_modules(config: Config, name: str) -> list[str]:
    """Modules that the config names, and so no import statement does."""
    if name in ("ingest", "score"):
        tables = [config.source, *[join.table for join in config.source.joins]]
        named = [f"pipelines.sources.{table.format}" for table in tables]
        return named + [table.prepare.function.partition(":")[0] for table in tables if table.prepare]
    if name in ("train", "tune") and config.model:
        from pipelines.models.names import network_path

        return ["pipelines.train.worker", network_path(config.model.network).partition(":")[0]]
    return []


def _files_digest(table: Table) -> str:
    files = [file for group in raw_files(table).values() for file in group]
    return files_digest(files, root=root_of(table))


def _reference_digest(reference: Reference) -> str:
    files = named_files([reference.table], reference.format, key="source.checks: reference")
    return files_digest(files, root=Path(os.path.commonpath(files)))


def _why_run(before: Receipt | None, made_from: dict[str, str]) -> str:
    """Why the stage must run, or nothing where it is up to date."""
    if before is None:
        return "for the first time"
    parts = changed(before.made_from, made_from)
    if parts and not (parts == ["champion"] and _is_own_champion(before)):
        return ", ".join(parts[:3]) + (f" and {len(parts) - 3} more" if len(parts) > 3 else "") + " changed"
    gone = [output for output, size in before.outputs.items() if not _still_there(output, size)]
    if gone:
        return f"{gone[0]} is gone" + (f" and {len(gone) - 1} more" if len(gone) > 1 else "")
    if before.stage == "register":
        now = tracking.champion(before.workload)
        if now is None or now.version != before.result["version"]:
            return f"the champion is {f'version {now.version}' if now else 'gone'}"
    return ""


def _why_stale(config: Config, ingested: Receipt) -> str:
    """Which rows grew too old since the stage ran; it then fails on them where the config wants that."""
    for check in config.source.checks:
        if check.freshness and check.consequence == "fail":
            newest = ingested.result["newest"][check.freshness.column]
            if newest is not None and not check.freshness.allows(newest, now=time.time()):
                return f"the newest {check.freshness.column} is over {check.freshness.max_hours:g} hours old"
    return ""


def _is_own_champion(evaluation: Receipt) -> bool:
    """Whether the champion came from this very evaluation, which so is not stale."""
    now = tracking.champion(evaluation.workload)
    return evaluation.stage == "evaluate" and now is not None and now.evaluation == evaluation.digest


def _still_there(output: str, size: int) -> bool:
    if output.startswith("models:/"):
        return tracking.model_exists(output)
    path = Path(output)
    return path.is_dir() if size < 0 else path.is_file() and path.stat().st_size == size


def _size_of(output: str) -> int:
    """Bytes of an output file; -1 for a folder or a model."""
    return Path(output).stat().st_size if Path(output).is_file() else -1


@contextmanager
def only_one(workload: str) -> Iterator[None]:
    """Hold the workload's lock: two drivers that write one Delta table on a local disk would harm it."""
    path = runs_path(workload) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise LakeError(
                f"{path}: another run of {workload} is at work (process {file.read().strip() or 'unknown'}); wait for "
                "it, or end it"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


class _Parent:
    """The MLflow run that a pipeline run's stages hang under, started with the first stage that runs.

    A single stage hangs under the run named by MLFLOW_RUN_ID, or under none.
    """

    def __init__(self, config: Config, *, single: bool) -> None:
        self._config = config
        self._single = single
        self._open = ExitStack()
        self._id: str | None = os.environ.pop("MLFLOW_RUN_ID", None) if single else None
        self._started = False

    def __enter__(self) -> "_Parent":
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)
        if self._started and error[0] is None:
            tracking.prune_runs(self._config.workload, keep=self._config.keep.runs)

    @contextmanager
    def stage(self, name: str) -> Iterator[tracking.Run]:
        """A run for a stage."""
        workload = self._config.workload
        if not self._started:
            tracking.check_reachable()
            tracking.end_stale_runs(workload)
            if not self._single:
                title = f"{workload} {datetime.now():%Y-%m-%d %H:%M:%S}"
                run = self._open.enter_context(tracking.start_run(workload, title, parent=None))
                run.text("config.yaml", yaml.safe_dump(self._config.model_dump(mode="json", by_alias=True)))
                self._id = run.id
            self._started = True
        with tracking.start_run(workload, name, parent=self._id, system_metrics=True) as run:
            yield run
