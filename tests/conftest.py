"""What the tests share: a lake of their own, one Spark session, small copies of the real data sets."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from pipelines.config import Config

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("HEADRACE_DATA") or ROOT / "../shared/data").resolve()

pytest.register_assert_rewrite("tests.faults")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as ranks have it from their launcher; read when torch is imported
os.chdir(ROOT)  # conf/ and Spark's properties are found from here


# The files that take longest come first, so that no process is left alone with one of them at the end. So do those that
# fork ranks: torch refuses a backward pass in a process that was forked from one with a backward pass behind it.
LONGEST = ("test_jobs", "test_workloads", "test_run", "test_cluster", "test_classic", "test_launch", "test_dry_run")
FORKING = (
    "test_elastic",
    "test_gossip",
    "test_choose",
    "test_strategies",
    "test_hooks",
    "test_strategy_faults",
    "test_kills",
    "test_loop",
    "test_balance",
    "test_diagnosis",
    "test_tune",
    "test_recommend",
    "test_labels",
    "test_serving",
)
FIRST = (*LONGEST, *FORKING)

# The tests' jobs are short: with the JVM's quick compiler alone, and without Spark's compiling of every query, they
# take half of the processor.
QUICK = (
    "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC "
    "-Dspark.sql.codegen.wholeStage=false -Dspark.sql.codegen.factoryMode=NO_CODEGEN"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST)

    items.sort(key=place)


def pytest_configure(config: pytest.Config) -> None:
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ["SPARK_SUBMIT_OPTS"] = QUICK


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of the real data sets."""
    if not (DATA / "mnist").is_dir():
        pytest.skip(f"no data sets at {DATA}; set HEADRACE_DATA")
    return DATA


@pytest.fixture(scope="session")
def session_lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lake whose MLflow tables are made once; tests copy them."""
    from pipelines import tracking

    root = tmp_path_factory.mktemp("lake")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRACE_LAKE", str(root))
        tracking.create_store()
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return root


@pytest.fixture
def lake(tmp_path: Path, session_lake: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty lake, with MLflow's tables."""
    root = tmp_path / "lake"
    root.mkdir()
    (root / "mlflow.db").write_bytes((session_lake / "mlflow.db").read_bytes())
    monkeypatch.setenv("HEADRACE_LAKE", str(root))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield root
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # MLflow sets it


@pytest.fixture(scope="session")
def spark(session_lake: Path) -> Iterator[object]:
    """The one Spark session of the tests."""
    from pipelines import predict, session
    from pipelines.config import load_config

    predict.TIMED_ROWS = 1000
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRACE_LAKE", str(session_lake))
        patch.setenv("SPARK_SUBMIT_OPTS", f"{QUICK} -Dspark.python.daemon.module=tests.python_daemon")
        found = session.get_session(load_config("conf/digits.yaml"))
    yield found
    session.stop_session()


@pytest.fixture
def workload(tmp_path: Path) -> Callable[..., Path]:
    """Write a workload's file: `workload(rows)` for CSV text of (a, b, color, y), with sections to replace."""

    def write(rows: str | None = None, **sections: object) -> Path:
        raw = tmp_path / "raw"
        raw.mkdir(exist_ok=True)
        if rows is not None:
            (raw / "rows.csv").write_text(rows)
        config: dict[str, Any] = {
            "workload": "tiny",
            "source": {
                "format": "csv",
                "paths": str(raw / "*.csv"),
                "schema": "a double, b double, color string, y int",
            },
            "split": {"hash": {"shares": {"train": 0.6, "test": 0.4}}},
            "features": {
                "label": {"column": "y", "kind": "binary", "positive": [1], "negative": [0]},
                "inputs": {
                    "dense": {"columns": ["a", "b"], "steps": ["impute_mean", "standardize"]},
                    "ids": {"columns": ["color"], "steps": [{"vocabulary": {"min_count": 2}}]},
                },
            },
            "classic": [{"estimator": "LogisticRegression", "maxIter": 5}],
        }
        config.update(sections)
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}, sort_keys=False))
        return path

    return write


@pytest.fixture(scope="session")
def rows_csv() -> Callable[..., str]:
    """CSV text whose label depends on a, b and color: `rows_csv(200)`."""
    import numpy as np

    def make(num: int, *, seed: int = 0) -> str:
        generator = np.random.default_rng(seed)
        a, b = generator.normal(5, 2, num), generator.normal(-1, 1, num)
        color = generator.choice(["red", "green", "blue"], num)
        y = (a / 2 + b + (color == "red") + generator.normal(0, 0.5, num) > 2).astype(int)
        return "".join(f"{a[i]:.4f},{b[i]:.4f},{color[i]},{y[i]}\n" for i in range(num))

    return make


@pytest.fixture(scope="module")
def forked_ranks() -> Iterator[None]:
    """Ranks are forked from here, where torch and MLflow are imported; torchrun would have each import them."""
    import mlflow.pytorch  # noqa: F401
    import torch._dynamo

    from pipelines.tracking import Run
    from pipelines.train import launch, worker
    from tests.cluster import free_port

    writing = threading.RLock()  # who is forked while a thread writes to SQLite takes it for locked for ever

    def alone(write: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            with writing:
                write(*arguments)

        return call

    def run(config: "Config", job_path: Path, log: Path) -> None:
        torch.set_num_threads(1)
        processes, ranks, port = [], config.train.ranks, free_port()
        with writing:
            for rank in range(ranks):
                arguments = (worker.main, rank, ranks, port, job_path, log)
                processes.append(multiprocessing.get_context("fork").Process(target=_forked, args=arguments))
                processes[-1].start()
        while processes and all(process.exitcode in (None, 0) for process in processes):
            processes = [process for process in processes if process.exitcode is None]
            time.sleep(0.05)
        for process in processes:
            process.terminate()  # as torchrun does
        for process in processes:
            process.join(10)
            process.kill()
        if processes:
            raise subprocess.CalledProcessError(1, ["ranks"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_run_torchrun", run)
        patch.setattr(Run, "flush", alone(Run.flush))
        patch.setattr(Run, "tags", alone(Run.tags))
        yield


def _forked(main: Callable[[str], int], rank: int, ranks: int, port: int, job_path: Path, log: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": str(port)}
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = main(str(job_path))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
