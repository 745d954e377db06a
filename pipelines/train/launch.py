"""The train stage: start the ranks, by TorchDistributor or torchrun, and follow them."""

import contextlib
import ctypes
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TextIO

import matplotlib.figure

from pipelines import session, tracking
from pipelines.config import Config
from pipelines.errors import ConfigError, DataError, HeadraceError, TrainingError
from pipelines.features.fitted import FittedFeatures
from pipelines.lake import Snapshot, runs_path
from pipelines.progress import say
from pipelines.receipt import digest_of, write_json
from pipelines.stage import Given, Made
from pipelines.tracking import ModelRef
from pipelines.train.elastic.certificates import identities
from pipelines.train.follow import Follower, metrics_of
from pipelines.train.job import EpochResult, RankError, TrainJob, TrainResult
from pipelines.train.watch import WORKER, Watch

ALERTS = 10  # the last so many stay in the run's tag
_GPUS = "spark.task.resource.gpu.amount"
_LOSES_RANKS = ("torch", "failed barrier")  # Spark says so where a rank failed, and where its executor is gone
_EXECUTOR_LOST = re.compile(r"ExecutorLostFailure \((executor \S+).*?\) Reason: (.*)")


class Ended(Exception):
    """The ranks were ended because whoever had them started wished so."""


def _tell(text: str, *, file: TextIO | None = None) -> None:
    say(f"          {text}", file=file)


def build(given: Given) -> Made:
    """Train the config's network on its ranks, from the last checkpoint of this very job if there is one.

    Raises:
        DataError: The table has fewer rows than the run has lanes.
        TrainingError: A rank failed, and went on failing; the message is the first rank's that knew why.
    """
    job = _job_of(given)
    given.run.dataset(job.snapshot, name="features_train", context="training")
    given.run.params({"network": job.model.network, **job.model.params, **_flat(job.train.model_dump(mode="json"))})
    tell = partial(_tell, file=sys.stdout)  # to where TorchDistributor's own output does not go
    first, _ = job.checkpointed or (0, 0)
    for remark in job.train.remarks(job.steps):
        tell(remark)

    def on_epoch(epoch: EpochResult) -> None:
        if epoch.epoch >= first:  # the others were told when they were trained
            tell(epoch.story(job.train.epochs))
        given.run.metrics(metrics_of(epoch, job.beats()), step=epoch.epoch + 1)
        given.run.flush()

    alerts: list[str] = []

    def on_alert(text: str) -> None:
        alerts.append(text)
        with contextlib.suppress(Exception):  # where MLflow does not answer, the metrics tell
            given.run.tags({"headrace.alert": "\n".join(alerts[-ALERTS:])})

    result, restarts = run_job(given.config, job, on_epoch=on_epoch, on_alert=on_alert, tell=tell)
    given.run.figure("loss.png", _curves(result.epochs))
    if result.sample:
        given.run.text("sample.txt", result.sample)
    if job.chosen:
        given.run.tags({"headrace.strategy": job.chosen})
    _remove_other_jobs(job)
    ref = ModelRef(
        name=job.model.network,
        kind="torch",
        uri=result.uri,
        size_bytes=result.size_bytes,
        snapshot=job.snapshot.digest,
        features=job.fitted.digest,
        fit_seconds=result.seconds,
    )
    return Made(
        rows=sum(epoch.rows for epoch in result.epochs),
        result={
            "model": ref.model_dump(mode="json"),
            **result.model_dump(mode="json", exclude={"uri", "size_bytes"}),
            "ranks": job.train.ranks,
            "strategy": job.train.strategy.name,
            "restarts": restarts,
        },
        outputs=[ref.uri],
        lines=_story(result, restarts),
    )


def run_job(
    config: Config,
    job: TrainJob,
    *,
    on_epoch: Callable[[EpochResult], None],
    on_alert: Callable[[str], None] = lambda _: None,
    tell: Callable[[str], None] = _tell,
    should_end: Callable[[], bool] = lambda: False,
) -> tuple[TrainResult, list[str]]:
    """Start the job's ranks, again from the last checkpoint where one is lost.

    Args:
        config: Says how they are launched.
        job: What they do.
        on_epoch: Called with each epoch, in a thread.
        on_alert: Called with what is wrong with a rank, or why the ranks ended.
        tell: Called with what a user is told meanwhile.
        should_end: Asked a few times a second; once it says so, the ranks are ended.

    Returns:
        What they made, and why each restart was needed.

    Raises:
        Ended: They were ended by `should_end`.
        DataError: The table has fewer rows than the run has lanes.
        TrainingError: A rank failed, and went on failing.
    """
    if job.snapshot.rows < job.train.num_lanes:
        raise DataError(
            f"{job.snapshot.table} version {job.snapshot.version}: wanted a row for each of the {job.train.num_lanes} "
            f"lanes, seen {job.snapshot.rows} rows; lower train.lanes (at least train.ranks, {job.train.ranks})"
        )
    write_json(job.path, job)
    job.log_path.unlink(missing_ok=True)
    if job.checkpointed:
        epoch, step = job.checkpointed
        is_done = epoch == job.train.epochs
        tell("all epochs are done" if is_done else f"goes on from the checkpoint at epoch {epoch + 1}, step {step}")
    restarts: list[str] = []
    with Follower(job, on_epoch=on_epoch, on_alert=on_alert, tell=tell, should_end=should_end) as follower:
        while True:
            watch = follower.begin()
            try:
                with identities(job.folder, job.train.roles):
                    _run_ranks(config, job)
                break
            except _Lost as lost:
                if follower.is_ended:
                    raise Ended from None
                error = _why_failed(job, watch, follower.verdict, str(lost))
                on_alert(str(error))
                if not _may_help(job, error, follower.verdict) or len(restarts) == job.train.max_restarts:
                    raise error from lost.__cause__
            restarts.append(str(error))
            tell(f"{error}; starts again from the last checkpoint ({len(restarts)} of {job.train.max_restarts})")
    return TrainResult.model_validate_json(job.result_path.read_bytes()), restarts + job.lost()


def _may_help(job: TrainJob, error: HeadraceError, verdict: str) -> bool:
    """Whether starting again may help: a rank was lost, and did not tell of bad data or a bad config."""
    return isinstance(error, TrainingError) and (bool(verdict) or not any(e.cause == "known" for e in job.errors()))


def make_job(
    config: Config,
    fitted: FittedFeatures,
    *,
    folder: Path,
    train: Snapshot,
    validation: Snapshot | None,
    run_id: str = "",
) -> TrainJob:
    """A training of the config's network on one table.

    Args:
        config: The workload.
        fitted: What made the table.
        folder: Of its checkpoints.
        train: The table.
        validation: The table on which it is judged behind each epoch.
        run_id: The MLflow run that it is logged in; without one, nothing is.
    """
    assert config.model is not None, "trained only with a model"
    return TrainJob(
        workload=config.workload,
        folder=folder,
        model=config.model,
        train=config.train,
        seed=config.seed,
        snapshot=train,
        validation=validation,
        fitted=fitted,
        class_weights=fitted.label.spec.weights(config.class_weights),
        tracking_uri=tracking.tracking_uri() if run_id else "",
        run_id=run_id,
        keep_checkpoints=config.keep.checkpoints if run_id else 1,
    )


def _job_of(given: Given) -> TrainJob:
    config, features = given.config, given.inputs["features"].result
    snapshots = {split: Snapshot.model_validate(value) for split, value in features["snapshots"].items()}
    return make_job(
        config,
        FittedFeatures.model_validate(features["fitted"]),
        folder=runs_path(config.workload) / "train" / _learning_digest(given)[:16],
        train=snapshots["train"],
        validation=snapshots.get("validation"),
        run_id=given.run.id,
    )


def _learning_digest(given: Given) -> str:
    """Names what is learned, however many ranks learn it: a checkpoint fits a job of the same digest."""
    return digest_of({**given.made_from, "config train": digest_of(given.config.train.learned())})


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


class _Lost(Exception):
    """The ranks ended before the work was done; says why, where whoever started them knows."""


def _run_ranks(config: Config, job: TrainJob) -> None:
    # Without the last, a restarted rank can read a dead one's address from the shared store.
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    try:
        if _by_spark(config):
            _run_torch_distributor(config, job.path, job.log_path)
        else:
            _run_torchrun(config, job.path, job.log_path)
    except ConfigError:
        raise
    except (RuntimeError, subprocess.CalledProcessError) as error:
        raise _Lost from error
    except Exception as error:
        if session.active_session() is None or not any(word in str(error).lower() for word in _LOSES_RANKS):
            raise
        found = _EXECUTOR_LOST.search(str(error))
        raise _Lost(f"Spark lost {found[1]}: {found[2]}" if found else "") from error
    if not job.result_path.is_file():
        raise _Lost


def _by_spark(config: Config) -> bool:
    if config.train.launcher != "auto":
        return config.train.launcher == "spark"
    return (
        session.active_session() is not None or session.under_spark_submit() or not session.master().startswith("local")
    )


def _run_torch_distributor(config: Config, job_path: Path, log: Path) -> None:
    spark = session.get_session(config)
    from pyspark.ml.torch.distributor import TorchDistributor

    local = session.master().startswith("local")
    uses_gpu = not local and _uses_gpu(config.train.device, spark.sparkContext.getConf().get(_GPUS, "0"))
    distributor = TorchDistributor(num_processes=config.train.ranks, local_mode=local, use_gpu=uses_gpu)
    distributor.logger.setLevel(logging.WARNING)
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        # As a module, found through PYTHONPATH on every node; a file's path would have to be the same there.
        distributor.run("-m", WORKER, str(job_path))


def _uses_gpu(device: str, dealt: str) -> bool:
    """Whether a cluster's tasks are to see the GPU that Spark deals to each; otherwise they see none."""
    if device == "cuda" and float(dealt) != 1:
        raise ConfigError(
            f"train.device: cuda: wanted {_GPUS} 1 in {session.properties_file() or 'the properties of spark-submit'}, by "
            f"which each rank on a cluster gets its GPU; seen {dealt} (docs/gpu.md)"
        )
    return device != "cpu" and float(dealt) == 1


def _run_torchrun(config: Config, job_path: Path, log: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
    command += [f"--nproc-per-node={config.train.ranks}", "-m", WORKER, str(job_path)]
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent
        )
        try:
            if code := process.wait():
                raise subprocess.CalledProcessError(code, command)
        finally:
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=10)
                process.kill()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: torchrun then ends its ranks


def _why_failed(job: TrainJob, watch: Watch, verdict: str, reason: str) -> HeadraceError:
    """The error of the rank that failed by itself; the others fail because it is gone."""
    log = f"the ranks' log: {job.log_path}"
    if verdict:
        return TrainingError(f"{verdict}; {log}")
    errors = sorted(job.errors(), key=lambda error: (error.cause != "known", _follows(error), error.rank))
    silent = sorted(set(range(job.train.ranks)) - {error.rank for error in errors})
    if errors and not (silent and _follows(errors[0])):
        first = errors[0]
        text = f"rank {first.rank} on {first.host}, {first.place}: {first.message}; {log}"
        return ConfigError(first.message) if first.exit_code == 2 else TrainingError(text)
    watch.read_beats()
    at = max(((error.place.epoch, error.place.step) for error in errors), default=None)
    named = "; ".join(watch.last_seen(rank, at) for rank in silent)
    return TrainingError(f"{named}: ended without a word ({reason or 'killed, or out of memory?'}); {log}")


def _follows(error: RankError) -> bool:
    """Whether the rank failed only because another had."""
    return error.cause == "ended" or (error.cause == "unforeseen" and "peer" in error.message)


def _story(result: TrainResult, restarts: list[str]) -> list[str]:
    lines = [f"{len(result.epochs)} epochs, every row once in each by the receipts, {result.parameters:,} parameters"]
    if result.resumed_from != (0, 0):
        epoch, step = result.resumed_from
        lines.append(f"went on from the checkpoint at epoch {epoch + 1}, step {step}")
    if restarts:
        lines.append(f"started again {len(restarts)} times; the last because of: {restarts[-1]}")
    if result.best_epoch != len(result.epochs) - 1:
        lines.append(f"epoch {result.best_epoch + 1} was the best on validation; its weights were kept")
    return lines


def _curves(epochs: list[EpochResult]) -> matplotlib.figure.Figure:
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    numbers = [epoch.epoch + 1 for epoch in epochs]
    axes.plot(numbers, [epoch.loss for epoch in epochs], marker="o", label="training")
    if "validation_loss" in epochs[0].metrics:
        axes.plot(numbers, [epoch.metrics["validation_loss"] for epoch in epochs], marker="o", label="validation")
    axes.set(xlabel="epoch", ylabel="mean loss of a row", title="Loss")
    axes.legend()
    return figure


def _remove_other_jobs(job: TrainJob) -> None:
    """Checkpoints of jobs that learn something else can never be gone on from by this config; they go."""
    for folder in job.folder.parent.iterdir():
        if folder != job.folder:
            shutil.rmtree(folder, ignore_errors=True)
