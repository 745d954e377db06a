"""A candidate's search: asks Optuna for parameters, has them tried, and keeps every finished trial in a file.

Optuna: T. Akiba et al., 2019. `tpe`: J. Bergstra et al., Algorithms for Hyper-Parameter Optimization, 2011. Pruning by
the median: D. Golovin et al., Google Vizier, 2017.

What is kept is a JSON list of the finished trials, not Optuna's own journal: a trial that a kill cut short then is not
there, and is asked for again under its number and its own seed, so that an interrupted search goes on as if it had not
been.
"""

import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.config.tuning import Range, Space, Tune, values_of
from pipelines.errors import HeadraceError, one_line
from pipelines.receipt import write_json

AS_WRITTEN = 0  # the number of the trial of the config as it stands
PRUNE_AFTER_TRIALS = 4  # that were finished, before any is pruned
PRUNE_AFTER_STEPS = 2  # a first epoch, or fold, says little

_STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
optuna.logging.set_verbosity(optuna.logging.ERROR)


class Trial(BaseModel):
    """A finished trial.

    Attributes:
        number: 0 for the config as written, then in the order in which they were asked for.
        params: What it tried, by name in the space.
        value: Of the metric; None unless complete.
        reason: Why it failed, or which trial it repeats.
        steps: The metric so far by epoch or fold, from 1.
        run_id: Its run in MLflow.
    """

    model_config = ConfigDict(frozen=True)

    number: int
    params: dict[str, Any]
    state: Literal["complete", "pruned", "failed"]
    value: float | None = None
    reason: str = ""
    seconds: float = 0.0
    steps: dict[int, float] = {}
    run_id: str = ""


class Pruned(Exception):
    """The trial was ended, since others were better at the same point."""


class Attempt:
    """A trial under way, as the objective sees it.

    Attributes:
        params: What to try; nothing for the config as written.
        cancelled: Set when nobody waits for it any more.
        is_pruned: Whether a report was told that the trial is to end.
    """

    def __init__(self, number: int, params: dict[str, Any], cancelled: threading.Event) -> None:
        self.number, self.params, self.cancelled = number, params, cancelled
        self.steps: dict[int, float] = {}
        self.is_pruned = False
        self.trial: optuna.Trial | None = None

    def report(self, step: int, value: float, *, is_last: bool = False) -> None:
        """Tell the metric so far, at an epoch or a fold counted from 1; what comes once it is pruned counts no more."""
        if self.is_pruned or not math.isfinite(value):
            return
        self.steps[step] = value
        if self.trial is not None:
            self.trial.report(value, step)
            self.is_pruned = not is_last and self.trial.should_prune()


class Listener(Protocol):
    """Whoever is told of trials, in the thread that runs the search."""

    def started(self, number: int, params: Mapping[str, Any]) -> str:
        """A trial begins. Returns the id of its run in MLflow."""

    def ended(self, trial: Trial) -> None:
        """A trial is finished and kept."""


Objective = Callable[[Attempt], float]


class Search:
    """The trials of one candidate.

    Args:
        space: What is searched.
        how: The config's section.
        as_written: Values of the config as it stands, as far as they are known, by name in the space.
        maximize: Whether a higher metric is better.
        seed: With `parallel: 1`, of the whole search.
        path: Where finished trials are kept; those that are there are not tried again.

    Attributes:
        trials: Those finished, by number.
        total: How many there will be.
    """

    def __init__(
        self,
        space: Mapping[str, Space],
        how: Tune,
        *,
        as_written: Mapping[str, Any],
        maximize: bool,
        seed: int,
        path: Path,
    ) -> None:
        self._space, self._how, self._seed, self._path = space, how, seed, path
        self._as_written, self._maximize = dict(as_written), maximize
        self._is_grid, self.total = how.tries_all(space), 1 + how.num_trials(space)
        pruner = optuna.pruners.MedianPruner(PRUNE_AFTER_TRIALS, PRUNE_AFTER_STEPS) if how.prune else None
        self._study = optuna.create_study(
            direction="maximize" if maximize else "minimize", pruner=pruner or optuna.pruners.NopPruner()
        )
        self.trials: dict[int, Trial] = {}
        for value in json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []:
            self._add(Trial.model_validate(value))

    def best(self) -> Trial | None:
        """The best complete trial, the first among equals."""
        complete = [trial for trial in self.trials.values() if trial.value is not None]
        sign = -1.0 if self._maximize else 1.0
        return min(complete, key=lambda t: (sign * (t.value or 0.0), t.number), default=None)

    def importances(self) -> dict[str, float]:
        """Each parameter's share in how good a trial is (PED-ANOVA: S. Watanabe et al., 2023); of few trials none."""
        values = {trial.value for trial in self.trials.values() if trial.value is not None and trial.number}
        if len(values) < 4 or len(self._space) < 2:
            return {}
        return {name: float(share) for name, share in optuna.importance.get_param_importances(self._study).items()}

    def run(self, objective: Objective, listener: Listener) -> None:
        """Try what is left, `parallel` trials at a time; a trial that raises an error of ours fails, and others go on."""
        cancelled, started = threading.Event(), time.monotonic()
        waiting = [number for number in range(self.total) if number not in self.trials]
        running: dict[Future[Trial], Attempt] = {}
        pool = ThreadPoolExecutor(self._how.parallel, thread_name_prefix="trial")
        try:
            while waiting or running:
                if self._how.timeout_s and time.monotonic() - started > self._how.timeout_s:
                    waiting = [number for number in waiting if number == AS_WRITTEN]
                # The first is alone: it finds whether anything works, and leaves caches filled.
                while waiting and len(running) < (self._how.parallel if self.trials else 1):
                    attempt = self._ask(waiting.pop(0), cancelled)
                    if (twin := self._twin(attempt)) is None:
                        run_id = listener.started(attempt.number, attempt.params)
                        running[pool.submit(_try, objective, attempt, run_id)] = attempt
                    else:
                        self._finish(attempt, _repeat(twin, attempt), listener)
                for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                    self._finish(running.pop(future), future.result(), listener)
        finally:
            cancelled.set()  # what still runs then, nobody waits for: a signal is answered at once
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, number: int, cancelled: threading.Event) -> Attempt:
        """The next parameters: a function of the seed, the number and the trials finished so far."""
        if number == AS_WRITTEN:
            return Attempt(number, {}, cancelled)
        if self._is_grid:
            self._study.enqueue_trial(self._encoded(self._point(number - 1)))
        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        is_tpe = self._how.search == "tpe"
        self._study.sampler = optuna.samplers.TPESampler(seed=seed) if is_tpe else optuna.samplers.RandomSampler(seed)
        trial = self._study.ask(self._distributions())
        attempt = Attempt(number, self._decoded(trial.params), cancelled)
        attempt.trial = trial
        return attempt

    def _twin(self, attempt: Attempt) -> Trial | None:
        """A finished trial of the same parameters."""
        for trial in self.trials.values():
            params = self._as_written if trial.number == AS_WRITTEN else trial.params
            if attempt.number != AS_WRITTEN and params == attempt.params:
                return trial
        return None

    def _finish(self, attempt: Attempt, trial: Trial, listener: Listener) -> None:
        if attempt.trial is None:
            self._add(trial)
        else:
            self.trials[trial.number] = trial
            self._study.tell(attempt.trial, trial.value, _STATES[trial.state])
        write_json(self._path, [kept.model_dump(mode="json") for kept in self.trials.values()])
        listener.ended(trial)

    def _add(self, trial: Trial) -> None:
        """Take over a trial that Optuna was not asked for; the config as written only where it lies in the space."""
        self.trials[trial.number] = trial
        params = trial.params if trial.number != AS_WRITTEN else self._as_written
        if params.keys() == self._space.keys() and all(_holds(self._space[n], value) for n, value in params.items()):
            self._study.add_trial(
                optuna.trial.create_trial(
                    state=_STATES[trial.state],
                    value=trial.value,
                    params=self._encoded(params),
                    distributions=self._distributions(),
                    intermediate_values=trial.steps,
                )
            )

    def _point(self, place: int) -> dict[str, Any]:
        values = [values_of(space) or [] for space in self._space.values()]
        return dict(zip(self._space, next(itertools.islice(itertools.product(*values), place, None)), strict=True))

    def _distributions(self) -> dict[str, BaseDistribution]:
        return {name: _distribution(space) for name, space in self._space.items()}

    def _encoded(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """As Optuna has them: a value of a list, which may be a list itself, by its place."""
        spaces = {name: self._space[name] for name in params}
        return {n: params[n] if isinstance(s, Range) else s.index(params[n]) for n, s in spaces.items()}

    def _decoded(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return {n: params[n] if isinstance(space, Range) else space[params[n]] for n, space in self._space.items()}


def _distribution(space: Space) -> BaseDistribution:
    if not isinstance(space, Range):
        return CategoricalDistribution(range(len(space)))
    if space.is_whole:
        return IntDistribution(int(space.low), int(space.high), space.log, int(space.step or 1))
    return FloatDistribution(space.low, space.high, space.log, space.step)


def _holds(space: Space, value: Any) -> bool:
    if not isinstance(space, Range):
        return value in space
    return isinstance(value, int | float) and _distribution(space)._contains(value)


def _try(objective: Objective, attempt: Attempt, run_id: str) -> Trial:
    """The trial, finished in one way or another; runs in a thread of its own."""
    started, value, reason = time.monotonic(), None, ""
    state: Literal["complete", "pruned", "failed"] = "complete"
    try:
        value = objective(attempt)
        if not math.isfinite(value):
            state, value, reason = "failed", None, f"the metric is {value}"
    except Pruned:
        state = "pruned"
    except ValidationError as error:
        state, reason = "failed", error.errors()[0]["msg"].removeprefix("Value error, ")
    except HeadraceError as error:
        state, reason = "failed", one_line(str(error), limit=300)
    return Trial(
        number=attempt.number,
        params=attempt.params,
        state=state,
        value=value,
        reason=reason,
        seconds=round(time.monotonic() - started, 3),
        steps=attempt.steps,
        run_id=run_id,
    )


def _repeat(trial: Trial, attempt: Attempt) -> Trial:
    """The outcome of a trial of the same parameters, without trying them again."""
    own = {"number": attempt.number, "params": attempt.params, "seconds": 0.0, "run_id": ""}
    return trial.model_copy(update=own | {"reason": f"as trial {trial.number}"})
