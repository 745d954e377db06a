"""The tune stage on a tiny workload: what it finds, what it tells, and what the other stages take from it."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyspark.sql import SparkSession

from pipelines import tracking
from pipelines.errors import ConfigError, DataError
from pipelines.lake import runs_path
from pipelines.receipt import Receipt
from pipelines.tune import search
from tests.stages import ran, run

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("forked_ranks")
LR = {"estimator": "LogisticRegression", "maxIter": 5, "regParam": 5.0, "elasticNetParam": 1.0}
TREE = {"estimator": "DecisionTreeClassifier", "maxDepth": 1}


@pytest.fixture(scope="module")
def features(
    spark: SparkSession, session_lake: Path, tmp_path_factory: pytest.TempPathFactory, rows_csv: Callable[..., str]
) -> Iterator[Path]:
    """A workload whose features are made, in a lake of its own."""
    root = tmp_path_factory.mktemp("tune")
    (root / "raw").mkdir()
    (root / "raw" / "rows.csv").write_text(rows_csv(400))
    config = {
        "workload": "tiny",
        "source": {"format": "csv", "paths": f"{root}/raw/*.csv", "schema": "a double, b double, color string, y int"},
        "split": {"hash": {"shares": {"train": 0.7, "test": 0.3}}, "validation": {"share": 0.3}},
        "features": {
            "label": {"column": "y", "kind": "binary", "positive": [1], "negative": [0]},
            "inputs": {
                "dense": {"columns": ["a", "b"], "steps": ["impute_mean", "standardize"]},
                "ids": {"columns": ["color"], "steps": ["vocabulary"]},
            },
        },
        "classic": [LR, TREE],
        "model": {"network": "mlp", "hidden": [4]},
        "train": {"ranks": 1, "batch_size": 16, "epochs": 4, "lr": 1.0e-3, "launcher": "torchrun"},
    }
    path = root / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRACE_LAKE", str(root / "lake"))
        (root / "lake").mkdir()
        shutil.copy(session_lake / "mlflow.db", root / "lake")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        run(path, "ingest", "features")
        yield path
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(autouse=True)
def lake_of_the_features(features: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_LAKE", str(features.parent / "lake"))


def tune(path: Path, section: dict[str, Any], *stages: str) -> dict[str, Receipt]:
    return run(path, *(stages or ("tune",)), overrides=(f"tune={json.dumps(section)}",))


def trials_of(receipts: dict[str, Receipt], name: str) -> list[dict[str, Any]]:
    return next(c["trials"] for c in receipts["tune"].result["candidates"] if c["name"] == name)


def test_a_grid_of_two_estimators(features: Path, capsys: Capture) -> None:
    section = {
        "search": "grid",
        "parallel": 2,
        "spaces": {
            "LogisticRegression": {"regParam": [5.0, 0.01, -1.0], "elasticNetParam": [0.0, 1.0]},
            "DecisionTreeClassifier": {"maxDepth": {"low": 1, "high": 3}},
        },
    }
    receipts = tune(features, section, "tune", "classic")
    out = capsys.readouterr().out
    regression, tree = receipts["tune"].result["candidates"]
    by_params = {(t["params"].get("regParam"), t["params"].get("elasticNetParam")): t for t in regression["trials"]}
    assert len(regression["trials"]) == 7 and len(tree["trials"]) == 4, "all points, and the config as written"
    assert by_params[-1.0, 0.0]["state"] == "failed" and "MLlib refuses" in by_params[-1.0, 0.0]["reason"]
    assert by_params[5.0, 1.0]["reason"] == "as trial 0", "nothing is tried twice"
    assert regression["value"] > regression["as_written"] == by_params[5.0, 1.0]["value"]
    best_params = regression["params"]
    assert tree["trials"][0]["value"] == tree["as_written"] <= tree["value"] and tree["params"]["maxDepth"] > 1
    assert receipts["tune"].result["best"]["DecisionTreeClassifier"] == tree["params"]
    assert "candidate" in out and f"{regression['value']:.5f}" in out
    client = tracking.mlflow_client()
    logged = client.get_run(receipts["classic"].run_id).data.params
    assert logged["LogisticRegression.elasticNetParam"] == str(best_params["elasticNetParam"])
    experiment = client.get_experiment_by_name("tiny").experiment_id
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{receipts['tune'].run_id}'")
    assert len(children) == 6 + 3 and {c.info.status for c in children} == {"FINISHED", "FAILED"}
    best = next(c for c in children if c.info.run_id == regression["trials"][regression["best"]]["run_id"])
    assert best.data.params == {name: str(value) for name, value in best_params.items()}
    assert best.data.metrics["auc"] == pytest.approx(regression["value"])
    plots = {artifact.path for artifact in client.list_artifacts(receipts["tune"].run_id)}
    assert {"LogisticRegression.png", "DecisionTreeClassifier.png", "trials.json"} <= plots
    tune(features, section, "tune", "classic")
    assert not ran(capsys.readouterr().out), "up to date"
    tune(features, section | {"parallel": 1}, "tune", "classic")
    out = capsys.readouterr().out
    assert ran(out) == ["tune"] and "7 of 7 trials are there already" in out, "what it found is the same"


def test_a_network_with_pruning_is_trained_by_what_was_found(
    features: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "PRUNE_AFTER_TRIALS", 2)
    lrs = [0.05, 0.02, 1e-7, 1e30]
    section = {"search": "grid", "parallel": 2, "spaces": {"train": {"lr": lrs, "epochs": [30]}}}
    receipts = tune(features, section, "tune", "train")
    out = capsys.readouterr().out
    trials = {t["params"].get("train.lr"): t for t in trials_of(receipts, "mlp")}
    assert trials[1e-7]["state"] == "pruned" and len(trials[1e-7]["steps"]) < 30
    assert (
        trials[1e30]["state"] == "failed"
        and "wanted a finite loss, seen none; lower train.lr, now 1e+30" in trials[1e30]["reason"]
    )
    assert trials[None]["value"] < trials[0.05]["value"] == trials[0.05]["steps"]["30"]
    best = receipts["tune"].result["best"]
    assert best == {"train": {"lr": best["train"]["lr"], "epochs": 30}} and best["train"]["lr"] > 0.01
    epochs = receipts["train"].result["epochs"]
    assert len(epochs) == 30 and "epoch 30/30" in out, "the train stage takes the parameters"
    assert epochs[-1]["metrics"]["validation_auc"] == trials[best["train"]["lr"]]["value"], (
        "and learns the same network"
    )
    left = [path.name for path in runs_path("tiny").glob("tune/*/*")]
    assert left == ["trials.json"], "checkpoints of trials are removed"


def test_trials_weigh_classes_as_the_training_does(features: Path, capsys: Capture) -> None:
    section = json.dumps({"search": "grid", "metric": "log_loss", "spaces": {"train": {"lr": [0.05]}}})
    found = []
    for weights in ("null", "{0: 1, 1: 9}"):
        overrides = (f"tune={section}", f"class_weights={weights}")
        receipts = run(features, "tune", "train", overrides=overrides)
        assert "there already" not in capsys.readouterr().out, "trials with other weights are others"
        best = receipts["tune"].result["candidates"][0]["value"]
        assert best == min(e["metrics"]["validation_loss"] for e in receipts["train"].result["epochs"])
        found.append(best)
    assert found[0] != found[1]


def test_cross_validation(features: Path) -> None:
    """Of an estimator and of a network, which takes the parts as lists of files of one table each."""
    section = {
        "search": "random",
        "trials": 2,
        "folds": 2,
        "metric": "log_loss",
        "spaces": {"LogisticRegression": {"regParam": {"low": 0.01, "high": 1.0, "log": True}}, "train": {"lr": [0.1]}},
    }
    receipts = tune(features, section)
    regression, network = receipts["tune"].result["candidates"]
    assert [len(t["steps"]) for t in regression["trials"]] == [2, 2, 2]
    assert regression["value"] < regression["as_written"], "a lower log loss is better"
    assert network["params"] == {"train.lr": 0.1} and len(network["trials"][1]["steps"]) == 2
    assert not list((features.parent / "lake" / "tmp" / "tiny").iterdir()), "the tables of the parts are removed"


def test_all_trials_failed(features: Path) -> None:
    with pytest.raises(
        DataError, match="LogisticRegression: wanted a trial that ends, seen 2 that failed: .*MLlib refuses"
    ):
        run(
            features,
            "tune",
            overrides=("tune={search: grid, spaces: {LogisticRegression: {maxIter: [-2]}}}", "classic.0.maxIter=-1"),
        )


def test_without_a_section(features: Path) -> None:
    with pytest.raises(ConfigError, match="tiny: tune: wanted a section `tune` in the config, seen none"):
        run(features, "tune")
