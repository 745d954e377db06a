"""The tune stage: searches better parameters for each candidate that the config names a space for.

It reads the training and the validation table; the test split it never reads.
"""

import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pipelines import plots
from pipelines.config.tuning import Range
from pipelines.config.workload import LOWER_IS_BETTER
from pipelines.errors import DataError
from pipelines.lake import Snapshot, runs_path
from pipelines.progress import say
from pipelines.receipt import digest_of
from pipelines.stage import Given, Made
from pipelines.tracking import Run
from pipelines.tune import mllib, network
from pipelines.tune.search import AS_WRITTEN, Objective, Search, Trial

_STATUS: dict[str, Literal["FINISHED", "KILLED", "FAILED"]] = {  # as MLflow's own storage for Optuna has them
    "complete": "FINISHED",
    "pruned": "KILLED",
    "failed": "FAILED",
}


class Tuned(BaseModel):
    """What was found for a candidate.

    Attributes:
        name: The estimator's, or the network's.
        section: Where the config has it: the estimator's name, or `model`, which stands for `model` and `train`.
        as_written: The metric of the config as it stands; None where that trial failed.
        best: The number of the best trial.
        value: Its metric.
        params: Its parameters; none where the config as written was the best.
        importances: Share of each parameter in how good a trial is.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    section: str
    as_written: float | None
    best: int
    value: float
    params: dict[str, Any]
    importances: dict[str, float]
    trials: list[Trial]


def build(given: Given) -> Made:
    """Search each candidate's space; trials that an earlier run of this very search finished are kept.

    Raises:
        DataError: All trials of a candidate failed.
    """
    config = given.config
    assert config.tune is not None, "the stage is declared only with a tune section"
    tables = {
        split: Snapshot.model_validate(value) for split, value in given.inputs["features"].result["snapshots"].items()
    }
    train, validation = tables["train"], None if config.tune.folds else tables["validation"]
    given.run.dataset(train, name="features_train", context="training")
    if validation is not None:
        given.run.dataset(validation, name="features_validation", context="validation")
    folder = runs_path(config.workload) / "tune"
    digests = {section: _digest(given, section) for section in config.tune.candidates()}
    found = [_tune(given, section, train, validation, folder / digest[:16]) for section, digest in digests.items()]
    for other in folder.iterdir():  # trials of searches that this config can never go on with
        if other.name not in {digest[:16] for digest in digests.values()}:
            shutil.rmtree(other, ignore_errors=True)
    table = _table(found, config.tune_metric)
    given.run.note(f"```\n{table}\n```")
    given.run.json("trials.json", [tuned.model_dump(mode="json") for tuned in found])
    best: dict[str, dict[str, Any]] = {}
    for tuned in found:
        best |= network.by_section(tuned.params) if tuned.section == "model" else {tuned.section: tuned.params}
    return Made(
        rows=train.rows,
        result={
            "metric": config.tune_metric,
            "folds": config.tune.folds,
            "best": best,
            "candidates": [tuned.model_dump(mode="json") for tuned in found],
        },
        lines=table.splitlines(),
    )


def _digest(given: Given, section: str) -> str:
    """Names a search: finished trials fit any search of the same digest, however many trials it has."""
    config, tune = given.config, given.config.tune
    assert tune is not None, "the stage is declared only with a tune section"
    if section == "model":
        start: Any = [config.model and config.model.model_dump(mode="json"), config.train.learned()]
    else:
        start = next(e.model_dump(mode="json") for e in config.classic if e.estimator == section)
    made_from = {part: digest for part, digest in given.made_from.items() if not part.startswith("config ")}
    space = tune.candidates()[section]
    weights = config.model_dump(mode="json", include={"class_weights"})
    how = [tune.search, tune.tries_all(space), tune.folds, tune.prune, config.tune_metric, weights, config.seed]
    return digest_of([made_from, how, start, {name: _plain(values) for name, values in space.items()}])


def _plain(space: list[Any] | Range) -> Any:
    return space.model_dump(mode="json") if isinstance(space, Range) else space


def _tune(given: Given, section: str, train: Snapshot, validation: Snapshot | None, folder: Path) -> Tuned:
    config, tune = given.config, given.config.tune
    assert tune is not None and train.contract is not None, "declared with a tune section; a feature table"
    objective: AbstractContextManager[Objective]
    if section == "model":
        assert config.model is not None, "tuned only with a model"
        name, values = config.model.network, network.values_as_written(config)
        objective = network.objective(given, train, validation, folder)
        tune = tune.model_copy(update={"parallel": 1}) if network.on_cluster(config) else tune
    else:
        wanted = next(estimator for estimator in config.classic if estimator.estimator == section)
        name, values = section, mllib.values_as_written(given, wanted, train.contract)
        objective = mllib.objective(given, wanted, train, validation)
    space = tune.candidates()[section]
    search = Search(
        space,
        tune,
        as_written={key: values[key] for key in space if key in values},
        maximize=config.tune_metric not in LOWER_IS_BETTER,
        seed=config.seed,
        path=folder / "trials.json",
    )
    reporter = _Reporter(given.run, name, search, config.tune_metric)
    if len(search.trials) < search.total:
        with objective as attempted:
            search.run(attempted, reporter)
    return _found(given.run, name, section, search, config.tune_metric)


def _found(run: Run, name: str, section: str, search: Search, metric: str) -> Tuned:
    best = search.best()
    if best is None or best.value is None:
        reasons = list(dict.fromkeys(trial.reason for trial in search.trials.values() if trial.reason))
        raise DataError(
            f"tune: {name}: wanted a trial that ends, seen {len(search.trials)} that failed: {'; '.join(reasons[:3])}"
        )
    trials = [search.trials[number] for number in sorted(search.trials)]
    importances = search.importances()
    run.figure(f"{name}.png", plots.trials([trial.value for trial in trials], metric, name, importances))
    run.metrics({f"{name}/{metric}": best.value})
    run.params({f"{name}.{key}": value for key, value in best.params.items()})
    return Tuned(
        name=name,
        section=section,
        as_written=search.trials[AS_WRITTEN].value,
        best=best.number,
        value=best.value,
        params=best.params,
        importances=importances,
        trials=trials,
    )


class _Reporter:
    """Tells the user and MLflow of a candidate's trials; those that are there already come under this stage's run."""

    def __init__(self, run: Run, name: str, search: Search, metric: str) -> None:
        self._run, self._name, self._search, self._metric = run, name, search, metric
        self._open: dict[str, Run] = {}
        for trial in search.trials.values():
            if trial.run_id:
                run.adopt(trial.run_id)
        if search.trials:
            say(f"          {name}: {len(search.trials)} of {search.total} trials are there already")

    def started(self, number: int, params: Mapping[str, Any]) -> str:
        """Open the trial's run."""
        child = self._run.child(f"{self._name} {number}")
        child.params(params)
        self._open[child.id] = child
        return child.id

    def ended(self, trial: Trial) -> None:
        """Close the trial's run, and say how it ended."""
        if child := self._open.pop(trial.run_id, None):
            for step, value in trial.steps.items():
                child.metrics({f"{self._metric}_so_far": value}, step=step)
            child.metrics({"seconds": trial.seconds} | ({} if trial.value is None else {self._metric: trial.value}))
            child.tags({"headrace.trial": trial.state, "headrace.reason": trial.reason})
            child.end(_STATUS[trial.state])
        ended = trial.state if trial.value is None else f"{self._metric} {trial.value:.5f}"
        what = ", ".join(f"{name} {_short(value)}" for name, value in trial.params.items()) or "as written"
        why = f"; {trial.reason}" if trial.reason else ""
        say(
            f"          {self._name} {trial.number} of {self._search.total - 1}: {ended} in {trial.seconds:.1f} s ({what}){why}"
        )


def _table(found: list[Tuned], metric: str) -> str:
    """The best of each candidate against the config as written."""
    lines = [["candidate", f"{metric} as written", "best", "trials", "pruned", "failed", "best parameters"]]
    for tuned in found:
        states = [trial.state for trial in tuned.trials]
        params = ", ".join(f"{name} {_short(value)}" for name, value in tuned.params.items())
        lines.append(
            [
                tuned.name,
                "failed" if tuned.as_written is None else f"{tuned.as_written:.5f}",
                f"{tuned.value:.5f}",
                *[str(len(states)), str(states.count("pruned")), str(states.count("failed"))],
                params or "as written",
            ]
        )
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if 0 < place < 6 else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
