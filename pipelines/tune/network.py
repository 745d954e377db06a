"""Trials of the torch network: each is a training of its own ranks, as in the train stage, and leaves nothing behind."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any

from pipelines import session
from pipelines.config import Config
from pipelines.errors import DataError, TrainingError
from pipelines.features.fitted import FittedFeatures
from pipelines.lake import Snapshot
from pipelines.receipt import digest_of
from pipelines.session import get_session
from pipelines.stage import Given
from pipelines.train.job import EpochResult, TrainJob
from pipelines.train.launch import Ended, make_job, run_job
from pipelines.tune.folds import fold_tables, together
from pipelines.tune.search import Attempt, Objective, Pruned


@contextmanager
def objective(given: Given, train: Snapshot, validation: Snapshot | None, folder: Path) -> Iterator[Objective]:
    """How good the network is with an attempt's parameters, while the body runs; attempts may run in threads.

    Args:
        given: The stage's.
        train: The training table.
        validation: The validation table; None where there are folds.
        folder: Of the trials' checkpoints.
    """
    tune = given.config.tune
    assert tune is not None, "declared with a tune section"
    with contextlib.ExitStack() as stack:
        pairs = [(train, validation)]
        if tune.folds:
            parts = stack.enter_context(fold_tables(get_session(given.config), train, given.config, folds=tune.folds))
            pairs = [(together([other for other in parts if other is not part]), part) for part in parts]
        fitted = FittedFeatures.model_validate(given.inputs["features"].result["fitted"])
        yield lambda attempt: _mean(attempt, pairs, given.config, fitted, folder)
    for left in folder.glob("*-*"):  # of a run that was killed, and whose parameters were not asked for again
        rmtree(left, ignore_errors=True)


def _mean(
    attempt: Attempt,
    pairs: list[tuple[Snapshot, Snapshot | None]],
    written: Config,
    fitted: FittedFeatures,
    folder: Path,
) -> float:
    """The metric's mean over the pairs, each of the epoch whose weights would be kept."""
    config = written.tuned(by_section(attempt.params))
    if config.train.launcher == "auto" and not on_cluster(config):
        config = config.tuned({"train": {"launcher": "torchrun"}})  # several may run at a time; no session is needed
    total = 0.0
    for place, (train, validation) in enumerate(pairs, 1):
        name = f"{attempt.number}-{digest_of([attempt.params, train.digest])[:16]}"
        job = make_job(config, fitted, folder=folder / name, train=train, validation=validation)
        total += _trained(attempt, config, job, reports=len(pairs) == 1)
        if len(pairs) > 1:
            attempt.report(place, total / place, is_last=place == len(pairs))
        if attempt.is_pruned:
            raise Pruned
    return total / len(pairs)


def on_cluster(config: Config) -> bool:
    """Whether Spark starts the ranks, which take its free places; else they are started here."""
    launcher = config.train.launcher
    return launcher == "spark" or (launcher == "auto" and not session.master().startswith("local"))


def _trained(attempt: Attempt, config: Config, job: TrainJob, *, reports: bool) -> float:
    """Train the job to its end, or until the attempt is pruned by an epoch."""
    metric = config.tune_metric

    def on_epoch(epoch: EpochResult) -> None:
        if reports and (value := _value(epoch, metric)) is not None:
            attempt.report(epoch.epoch + 1, value, is_last=epoch.epoch + 1 == job.train.epochs)

    def should_end() -> bool:
        return attempt.is_pruned or attempt.cancelled.is_set()

    try:
        result, _ = run_job(config, job, on_epoch=on_epoch, should_end=should_end)
    except Ended:
        raise Pruned from None
    except TrainingError as error:
        raise TrainingError(str(error).partition("; the ranks' log")[0]) from None  # which goes with the folder
    finally:
        if not attempt.cancelled.is_set():  # an interrupted trial goes on from its checkpoint
            rmtree(job.folder, ignore_errors=True)
    value = _value(result.epochs[result.best_epoch], metric)
    if value is None:
        raise DataError(f"{job.model.network}: wanted {metric} on the rows that are measured, seen none")
    return value


def _value(epoch: EpochResult, metric: str) -> float | None:
    found = epoch.metrics.get(f"validation_{metric}")
    return epoch.metrics["validation_loss"] if found is None and metric == "log_loss" else found


def by_section(params: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`{"train.lr": 0.1}` as `{"train": {"lr": 0.1}}`."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in params.items():
        section, _, key = name.partition(".")
        found.setdefault(section, {})[key] = value
    return found


def values_as_written(config: Config) -> dict[str, Any]:
    """What the sections `model` and `train` say, defaults of `train` among them, by dotted names."""
    assert config.model is not None, "tuned only with a model"
    train = config.train.model_dump(mode="json")
    nested = {f"train.{k}.{name}": v for k, part in train.items() if isinstance(part, dict) for name, v in part.items()}
    return {
        **{f"model.{name}": value for name, value in config.model.params.items()},
        **{f"train.{name}": value for name, value in train.items()},
        **nested,
    }
