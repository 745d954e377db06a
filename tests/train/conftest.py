"""The train stage on a small table."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines import tracking
from pipelines.config import load_config
from pipelines.features.fitted import FittedFeatures, FittedInput, FittedLabel, FittedVector
from pipelines.receipt import Receipt
from pipelines.stage import Given, Made
from pipelines.train.launch import build
from tests.conftest import ROOT
from tests.tables import BINARY, DENSE, contract_of, feature_table

Workload = Callable[..., Path]


@pytest.fixture
def train(lake: Path, workload: Workload) -> Callable[..., Made]:
    """Run the stage on a small table: `train(epochs=1)`, with settings of its section to replace."""
    snapshot = feature_table(lake / "tables" / "tiny" / "features" / "train", [70, 50], contract_of(DENSE))
    inputs = (FittedInput(name="dense", kind="dense", whole=FittedVector(source="x", width=4)),)
    fitted = FittedFeatures(inputs=inputs, label=FittedLabel(spec=BINARY), columns={"x": "array<float>"})
    result = {"snapshots": {"train": snapshot.model_dump(mode="json")}, "fitted": fitted.model_dump(mode="json")}
    features = Receipt(stage="features", workload="tiny", digest="f", made_from={}, seconds=1, rows=120, result=result)

    def run(network: str = "softmax", **settings: object) -> Made:
        section = {"ranks": 2, "batch_size": 16, "epochs": 3, "launcher": "torchrun", "timeout_s": 60} | settings
        config = load_config(workload("", model={"network": network}, train=section, classic=[]))
        with tracking.start_run("tiny", "train", parent=None) as mlflow_run:
            given = Given(config=config, inputs={"features": features}, run=mlflow_run, made_from={})
            return build(given)

    return run


def plant(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")


def run_of(workload: str) -> Any:
    """The workload's only MLflow run."""
    client = tracking.mlflow_client()
    (run,) = client.search_runs([client.get_experiment_by_name(workload).experiment_id])
    return run


def weights_of(made: Made, tmp_path: Path) -> dict[str, list[float]]:
    """The weights of the logged model."""
    network = tracking.load_torch(str(tracking.download(made.outputs[0], tmp_path)))
    return {name: tensor.tolist() for name, tensor in network.state_dict().items()}


def rank_processes(lake: Path) -> list[psutil.Process]:
    """The ranks that train in the lake."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "pipelines.train.worker" in command and str(lake) in command[-1]:
            found.append(process)
    return found
