"""The long form: Ctrl-C and kill -9 in every stage, and a full disk anywhere in the chain. `make test-faults`.

Moments are drawn uniformly over the wall time of an undisturbed run. The seed is printed; HEADRACE_FAULT_SEED
repeats a run with it. The short form stands in tests/test_jobs.py.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.faults import SEED, STAGES, Bench, check_full_disk, on_a_full_disk

pytestmark = pytest.mark.faults
TRIALS = 3


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory, session_lake: Path, rows_csv: Callable[..., str]
) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("faults")
    lake, config = root / "lake", root / "tiny.yaml"
    lake.mkdir()
    shutil.copy(session_lake / "mlflow.db", lake)
    (root / "rows.csv").write_text(rows_csv(2000))
    sections = {
        "workload": "tiny",
        "source": {"format": "csv", "paths": f"{root}/rows.csv", "schema": "a double, b double, color string, y int"},
        "split": {"hash": {}, "validation": {"share": 0.2}},
        "features": {
            "label": {"column": "y", "kind": "binary", "positive": [1], "negative": [0]},
            "inputs": {
                "dense": {"columns": ["a", "b"], "steps": ["standardize"]},
                "ids": {"columns": ["color"], "steps": ["vocabulary"]},
            },
        },
        "classic": [{"estimator": "LogisticRegression", "maxIter": 5}],
        "model": {"network": "mlp", "hidden": [4]},
        "train": {"ranks": 2, "batch_size": 16, "epochs": 4},
    }
    config.write_text(yaml.safe_dump(sections))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYSPARK", "SPARK_CONF", "MLFLOW", "OMP"))}
    environment["HEADRACE_LAKE"] = str(lake)
    print(f"seed {SEED}")
    yield Bench(lake, config, environment)


@pytest.fixture(scope="module")
def undisturbed(bench: Bench) -> tuple[dict[str, Path], dict[str, float], dict[str, object]]:
    """Of one run of all stages: the lake as it was before each, the wall time of each, what the receipts say."""
    before, seconds = {}, {}
    for stage in STAGES:
        before[stage] = bench.lake.parent / f"before-{stage}"
        shutil.copytree(bench.lake, before[stage])
        started = time.monotonic()
        bench.finish(stage)
        seconds[stage] = time.monotonic() - started
    return before, seconds, bench.made()


@pytest.mark.parametrize("number", range(TRIALS))
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_stage_goes_on(
    bench: Bench,
    undisturbed: tuple[dict[str, Path], dict[str, float], dict[str, object]],
    stage: str,
    how: signal.Signals,
    number: int,
) -> None:
    before, seconds, wanted = undisturbed
    shutil.rmtree(bench.lake)
    shutil.copytree(before[stage], bench.lake)
    generator = random.Random(f"{SEED}:{stage}:{how.name}:{number}")
    bench.interrupt(stage, how, generator.uniform(0, seconds[stage]))
    bench.check_goes_on(stage, wanted)


@pytest.mark.parametrize("free_kb", [100, 200, 400, 800])
def test_a_full_disk(bench: Bench, session_lake: Path, free_kb: int) -> None:
    done = on_a_full_disk(bench, "run", session_lake / "mlflow.db", free_kb=free_kb)
    if done is None:
        pytest.skip("needs the right to make a mount namespace")
    check_full_disk(done)
