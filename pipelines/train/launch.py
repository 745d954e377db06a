"""The train stage: start the ranks, by TorchDistributor or torchrun, and follow them."""

import contextlib
import ctypes
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import matplotlib.figure

from pipelines import session, tracking
from pipelines.config import Config
from pipelines.errors import ConfigError, DataError, HeadraceError, TrainingError
from pipelines.features.fitted import FittedFeatures
from pipelines.lake import Snapshot, runs_path
from pipelines.progress import Progress, say
from pipelines.receipt import write_json
from pipelines.stage import Given, Made
from pipelines.tracking import ModelRef, Run
from pipelines.train.job import EpochResult, RankError, TrainJob, TrainResult

WORKER = "pipelines.train.worker"


def build(given: Given) -> Made:
    """Train the config's network on its ranks, from the last checkpoint of this very job if there is one.

    Raises:
        DataError: The table has fewer rows than the run has lanes.
        TrainingError: A rank failed; the message is the first rank's that knew why.
    """
    job = _make_job(given)
    if job.snapshot.rows < job.train.num_lanes:
        raise DataError(
            f"{job.snapshot.table} version {job.snapshot.version}: wanted a row for each of the {job.train.num_lanes} "
            f"lanes, seen {job.snapshot.rows} rows; lower train.lanes (at least train.ranks, {job.train.ranks})"
        )
    job.folder.mkdir(parents=True, exist_ok=True)
    for path in (job.result_path, job.epochs_path, job.progress_path, *job.folder.glob("error-rank-*.json")):
        path.unlink(missing_ok=True)
    job_path = job.folder / "job.json"
    write_json(job_path, job)
    given.run.dataset(job.snapshot, name="features_train", context="training")
    given.run.params({"network": job.model.network, **job.model.params, **_flat(job.train.model_dump(mode="json"))})
    with _followed(job, given.run):
        _run_ranks(given.config, job, job_path)
    result = TrainResult.model_validate_json(job.result_path.read_bytes())
    given.run.figure("loss.png", _curves(result.epochs))
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
        result={"model": ref.model_dump(mode="json"), **result.model_dump(mode="json", exclude={"uri", "size_bytes"})},
        outputs=[ref.uri],
        lines=_story(result),
    )


def _make_job(given: Given) -> TrainJob:
    config, features = given.config, given.inputs["features"].result
    assert config.model is not None, "the stage is declared only with a model"
    snapshots = {split: Snapshot.model_validate(value) for split, value in features["snapshots"].items()}
    return TrainJob(
        workload=config.workload,
        digest=given.digest,
        folder=runs_path(config.workload) / "train" / given.digest[:16],
        model=config.model,
        train=config.train,
        seed=config.seed,
        snapshot=snapshots["train"],
        validation=snapshots.get("validation"),
        fitted=FittedFeatures.model_validate(features["fitted"]),
        tracking_uri=tracking.tracking_uri(),
        run_id=given.run.id,
        keep_checkpoints=config.keep.checkpoints,
    )


def _flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _run_ranks(config: Config, job: TrainJob, job_path: Path) -> None:
    log = job.folder / "ranks.log"
    # Without the last, a restarted rank can read a dead one's address from the shared store.
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    try:
        if _by_spark(config):
            _run_torch_distributor(config, job_path, log)
        else:
            _run_torchrun(config, job_path, log)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        raise _why_failed(job, log) from error
    except Exception as error:
        if session.active_session() is None or "torch" not in str(error).lower():
            raise
        raise _why_failed(job, log) from error
    if not job.result_path.is_file():
        raise _why_failed(job, log)


def _by_spark(config: Config) -> bool:
    if config.train.launcher != "auto":
        return config.train.launcher == "spark"
    return (
        session.active_session() is not None or session.under_spark_submit() or not session.master().startswith("local")
    )


def _run_torch_distributor(config: Config, job_path: Path, log: Path) -> None:
    session.get_session(config)
    from pyspark.ml.torch.distributor import TorchDistributor

    local = session.master().startswith("local")
    distributor = TorchDistributor(num_processes=config.train.ranks, local_mode=local, use_gpu=False)
    distributor.logger.setLevel(logging.WARNING)
    with log.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        # As a module, found through PYTHONPATH on every node; a file's path would have to be the same there.
        distributor.run("-m", WORKER, str(job_path))


def _run_torchrun(config: Config, job_path: Path, log: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
    command += [f"--nproc-per-node={config.train.ranks}", "-m", WORKER, str(job_path)]
    with log.open("w", encoding="utf-8") as file:
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


def _why_failed(job: TrainJob, log: Path) -> HeadraceError:
    """The error of the rank that failed by itself; the others fail because it is gone."""
    errors = [RankError.model_validate_json(path.read_bytes()) for path in sorted(job.folder.glob("error-rank-*.json"))]
    errors.sort(key=lambda error: (error.kind != "HeadraceError", "peer" in error.message, error.rank))
    silent = sorted(set(range(job.train.ranks)) - {error.rank for error in errors})
    if not errors or (silent and "peer" in errors[0].message):
        named = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
        return TrainingError(f"train: {named} ended without a word (killed, or out of memory?); the ranks' log: {log}")
    first = errors[0]
    text = f"rank {first.rank} on {first.host}: {first.message}; the ranks' log: {log}"
    return ConfigError(first.message) if first.exit_code == 2 else TrainingError(text)


@contextlib.contextmanager
def _followed(job: TrainJob, run: Run) -> Iterator[None]:
    """While the body runs, show progress and pass each epoch on to the user and to MLflow."""
    done = threading.Event()
    out = sys.stdout  # TorchDistributor's own output is sent elsewhere meanwhile

    def follow() -> None:
        seen = 0
        with Progress("train", unit="steps") as progress:
            while True:
                ended = done.wait(0.2)
                seen = _pass_on(job, run, seen, out)
                if ended:
                    return
                with contextlib.suppress(OSError, ValueError):
                    at = json.loads(job.progress_path.read_text(encoding="utf-8"))
                    progress.show(at["step"], at["steps"], f"epoch {at['epoch'] + 1}, loss {at['loss']:.4f}")

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _pass_on(job: TrainJob, run: Run, seen: int, out: TextIO) -> int:
    try:
        lines = job.epochs_path.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return seen
    whole = [line for line in lines if line.endswith("\n")]
    for line in whole[seen:]:
        epoch = EpochResult.model_validate_json(line)
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in epoch.metrics.items())
        say(
            f"          epoch {epoch.epoch + 1}/{job.train.epochs}: loss {epoch.loss:.4f}, {metrics}, "
            f"{epoch.rows_per_s:,.0f} rows/s, {epoch.data_wait_share:.0%} waiting for data",
            file=out,
        )
        run.metrics(
            {
                "train/loss": epoch.loss,
                "train/rows_per_s": epoch.rows_per_s,
                "train/data_wait_share": epoch.data_wait_share,
                **{_metric_name(name): value for name, value in epoch.metrics.items()},
            },
            step=epoch.epoch + 1,
        )
        run.flush()
    return len(whole)


def _metric_name(name: str) -> str:
    return f"validation/{name.removeprefix('validation_')}" if name.startswith("validation_") else f"train/{name}"


def _story(result: TrainResult) -> list[str]:
    lines = [f"{len(result.epochs)} epochs, every row once in each by the receipts, {result.parameters:,} parameters"]
    if result.resumed_from != (0, 0):
        epoch, step = result.resumed_from
        lines.append(f"went on from the checkpoint at epoch {epoch + 1}, step {step}")
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
    """Checkpoints of jobs with another digest can never be gone on from by this config; they go."""
    for folder in job.folder.parent.iterdir():
        if folder != job.folder:
            shutil.rmtree(folder, ignore_errors=True)
