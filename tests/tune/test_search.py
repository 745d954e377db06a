"""A search over a function of our own: what it tries, what it keeps, and that it goes on as if nothing had been."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.tuning import Tune
from pipelines.errors import DataError
from pipelines.tune.search import Attempt, Pruned, Search, Trial

SPACE = {"x": {"low": 0.0, "high": 1.0}, "hidden": [[8], [8, 4]]}
AS_WRITTEN = {"x": 0.7, "hidden": [8]}


class Told:
    """What the search tells."""

    def __init__(self) -> None:
        self.trials: list[Trial] = []

    def started(self, number: int, params: Mapping[str, Any]) -> str:
        return f"run {number}"

    def ended(self, trial: Trial) -> None:
        self.trials.append(trial)


def height(attempt: Attempt) -> float:
    """Highest at 0.3 and one layer; tells of five steps on the way."""
    params = AS_WRITTEN | attempt.params
    value = 0.0
    for step in range(1, 6):
        value = -((params["x"] - 0.3) ** 2) - 0.1 * len(params["hidden"]) + 0.01 * step
        attempt.report(step, value, is_last=step == 5)
        if attempt.is_pruned:
            raise Pruned
    return value


def slow_height(attempt: Attempt) -> float:
    time.sleep(0.05)
    return height(attempt)


def search(path: Path, *, seed: int = 0, space: Any = None, **how: Any) -> Search:
    tune = Tune(spaces={"model": space or SPACE}, **how)
    return Search(tune.spaces["model"], tune, as_written=AS_WRITTEN, maximize=True, seed=seed, path=path)


def outcomes(found: Search) -> list[Any]:
    return [(t.number, t.params, t.state, t.value, t.steps) for _, t in sorted(found.trials.items())]


@pytest.mark.parametrize("how", ["random", "tpe"])
def test_the_seed_gives_the_trials(tmp_path: Path, how: str) -> None:
    found = []
    for number, seed in enumerate((1, 1, 2)):
        found.append(search(tmp_path / str(number), search=how, seed=seed, trials=12))
        found[-1].run(height, Told())
    assert outcomes(found[0]) == outcomes(found[1]) != outcomes(found[2])
    assert len(found[0].trials) == 13 and found[0].trials[0].params == {}, "the config as written is tried as well"
    best = found[0].best()
    assert best is not None and best.value is not None and best.value >= found[0].trials[0].value  # type: ignore[operator]


def test_tpe_learns_and_prunes(tmp_path: Path) -> None:
    found = search(tmp_path / "t", trials=30)
    found.run(height, Told())
    assert any(trial.state == "pruned" and len(trial.steps) < 5 for trial in found.trials.values())
    late = [t.params["x"] for t in found.trials.values() if t.number > 20]
    assert sum(abs(x - 0.3) < 0.15 for x in late) > len(late) / 2
    assert list(found.importances()) == ["x", "hidden"] or list(found.importances()) == ["hidden", "x"]


def run_in(path: Path) -> None:
    search(path, trials=14).run(slow_height, Told())


def test_a_killed_search_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    undisturbed = search(tmp_path / "whole", trials=14)
    undisturbed.run(height, Told())
    process = multiprocessing.get_context("fork").Process(target=run_in, args=(tmp_path / "killed",))
    process.start()
    deadline = time.monotonic() + 60
    while len(search(tmp_path / "killed", trials=14).trials) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    again, told = search(tmp_path / "killed", trials=14), Told()
    assert 4 <= len(again.trials) < 15
    kept = set(again.trials)
    again.run(height, told)
    assert outcomes(again) == outcomes(undisturbed) and not kept & {trial.number for trial in told.trials}


def test_more_trials_go_on_from_those_there_are(tmp_path: Path) -> None:
    search(tmp_path / "t", trials=5).run(height, Told())
    more, told = search(tmp_path / "t", trials=8), Told()
    more.run(height, told)
    assert [trial.number for trial in told.trials] == [6, 7, 8]


def test_a_small_space_is_tried_whole_and_nothing_twice(tmp_path: Path) -> None:
    told = Told()
    search(tmp_path / "t", space={"x": [0.1, 0.7, 0.9], "hidden": [[8]]}, trials=20, search="random").run(height, told)
    assert [(t.params.get("x"), t.reason) for t in told.trials] == [
        (None, ""),
        (0.1, ""),
        (0.7, "as trial 0"),
        (0.9, ""),
    ]


def test_a_failing_trial_fails_alone(tmp_path: Path) -> None:
    def fails(attempt: Attempt) -> float:
        if attempt.number == 1:
            raise DataError("no such thing")
        return float("nan") if attempt.number == 2 else height(attempt)

    found = search(tmp_path / "t", trials=4, prune=False)
    found.run(fails, Told())
    states = {number: (trial.state, trial.reason) for number, trial in found.trials.items()}
    assert states[1] == ("failed", "no such thing") and states[2] == ("failed", "the metric is nan")
    assert states[3][0] == states[4][0] == "complete"


def test_parallel_trials_run_at_the_same_time_and_an_unforeseen_error_ends_them(tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=30)

    def meet(attempt: Attempt) -> float:
        if attempt.number:
            both.wait()
        if attempt.number == 3:
            raise ZeroDivisionError
        while attempt.number == 4 and not attempt.cancelled.wait(0.01):
            pass
        return 1.0

    found = search(tmp_path / "t", trials=4, parallel=2)
    with pytest.raises(ZeroDivisionError):
        found.run(meet, Told())
    assert {0, 1, 2} <= set(search(tmp_path / "t", trials=4).trials), "what was finished is kept"


def test_no_trial_starts_after_the_time(tmp_path: Path) -> None:
    found = search(tmp_path / "t", trials=1000, timeout_s=1)
    found.run(slow_height, Told())
    assert 1 < len(found.trials) < 1000
