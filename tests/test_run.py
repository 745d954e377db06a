"""A pipeline run does what is due and nothing else, says so, and survives rollbacks and refusals."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from pyspark.sql import SparkSession

from pipelines import receipt as receipt_module
from pipelines import register, tracking
from pipelines.audit import as_text, audit_row, audit_run
from pipelines.config import load_config
from pipelines.errors import ConfigError, LakeError, Refused, TrackingError
from pipelines.features.fitted import FittedFeatures
from pipelines.gate import Verdict
from pipelines.lake import Snapshot, receipt_path, table_path
from pipelines.receipt import changed, read_receipt
from pipelines.register import rollback
from pipelines.run import STAGES, depends_on, only_one
from pipelines.tracking import ModelRef
from tests.stages import ran, run

Capture = pytest.CaptureFixture[str]
Rows = Callable[..., str]
ALL = ["ingest", "features", "classic", "train", "evaluate", "register", "score"]


@pytest.fixture(scope="module")
def chain(
    spark: SparkSession,
    forked_ranks: None,
    session_lake: Path,
    tmp_path_factory: pytest.TempPathFactory,
    rows_csv: Rows,
) -> Iterator[Path]:
    """A tiny workload with all stages, run once in a lake of its own; the tests below go on from each other."""
    root = tmp_path_factory.mktemp("chain")
    (root / "raw").mkdir()
    (root / "raw" / "rows.csv").write_text(rows_csv(300))
    config = {
        "workload": "chain",
        "source": {"format": "csv", "paths": f"{root}/raw/*.csv", "schema": "a double, b double, color string, y int"},
        "split": {"hash": {"shares": {"train": 0.6, "test": 0.4}}, "validation": {"share": 0.25}},
        "features": {
            "label": {"column": "y", "kind": "binary", "positive": [1], "negative": [0]},
            "inputs": {
                "dense": {"columns": ["a", "b"], "steps": ["impute_mean", "standardize"]},
                "ids": {"columns": ["color"], "steps": ["vocabulary"]},
            },
        },
        "classic": [{"estimator": "LogisticRegression", "maxIter": 5}],
        "model": {"network": "mlp", "hidden": [4]},
        "train": {"ranks": 1, "batch_size": 16, "epochs": 2, "launcher": "torchrun"},
        "gate": {"require": {"auc": {"min": 0.5}}, "slices": ["color"]},
    }
    path = root / "chain.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRACE_LAKE", str(root / "lake"))
        (root / "lake").mkdir()
        shutil.copy(session_lake / "mlflow.db", root / "lake")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        run(path)
        yield path
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(autouse=True)
def lake_of_the_chain(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_LAKE", str(chain.parent / "lake"))


def test_receipts_hold_what_others_read(chain: Path) -> None:
    receipts = {name: json.loads(receipt_path("chain", name).read_text()) for name in ALL}
    for name, receipt in receipts.items():
        assert receipt["stage"] == name and receipt["workload"] == "chain"
        assert {"digest", "seconds", "rows", "result"} <= receipt.keys() and receipt["rows"] > 0
    epochs = receipts["train"]["result"]["epochs"]
    wanted = {"epoch", "rows", "row_id_sum", "loss", "metrics", "rows_per_s", "data_wait_share"}
    assert len(epochs) == 2 and all(wanted <= set(epoch) for epoch in epochs)
    assert all(len(epoch["ranks"]) == 1 and epoch["verdict"] for epoch in epochs)
    evaluation = receipts["evaluate"]["result"]
    assert [(c["name"], c["kind"]) for c in evaluation["candidates"]] == [
        ("LogisticRegression", "classic"),
        ("mlp", "torch"),
    ]
    for candidate in evaluation["candidates"]:
        assert set(candidate["metrics"]) == {"accuracy", "log_loss", "auc", "pr_auc", "ks"}
    assert evaluation["champion"] in ("LogisticRegression", "mlp")
    assert {s["value"] for s in evaluation["slices"]} == {"red", "green", "blue"}
    assert receipts["register"]["result"]["version"] == 1 and receipts["register"]["result"]["alias"] == "champion"
    assert receipts["score"]["result"]["table"] == str(table_path("chain", "predictions"))


def test_nothing_to_do(chain: Path, capsys: Capture) -> None:
    run(chain)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and all("up to date" in line for line in lines)


def test_predictions_are_one_runs_rows_in_the_labels_terms(chain: Path, spark: SparkSession) -> None:
    receipt_path("chain", "score").unlink()
    run(chain, "score")
    rows = spark.read.format("delta").load(str(table_path("chain", "predictions"))).collect()
    assert len(rows) == 300 == len({row["row_id"] for row in rows})
    assert {row["prediction"] for row in rows} <= {"0", "1"} and {row["model_version"] for row in rows} == {1}
    for row in rows[:20]:
        assert row["probability"] == max(row["probabilities"]) and row["_file"] == "rows.csv" and row["_line"] > 0


def due(chain: Path, *overrides: str) -> dict[str, list[str]]:
    """For each stage, what changed since its receipt."""
    config = load_config(chain, overrides)
    found = {}
    for name in ALL:
        inputs = {other: read_receipt(receipt_path("chain", other)) for other in STAGES[name].after if other in ALL}
        receipt = read_receipt(receipt_path("chain", name))
        assert receipt is not None
        now = depends_on(config, name, inputs)  # type: ignore[arg-type]
        if parts := [part for part in changed(receipt.made_from, now) if part != "champion"]:
            found[name] = parts
    return found


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("source.max_rejected=0.1", ["ingest"]),
        ("source.key=[a]", ["ingest", "features"]),
        ("split.validation.share=0.3", ["features", "evaluate", "score"]),
        ("features.layout.shard_mb=8", ["features"]),
        ("classic.0.maxIter=9", ["classic"]),
        ("model.hidden=[5]", ["train"]),
        ("train.lr=0.1", ["train"]),
        ("gate.metric=accuracy", ["evaluate"]),
        ("score.split=test", ["score"]),
        ("seed=1", ["features", "classic", "train", "evaluate", "score"]),
        ("keep.runs=7", []),
        ("lake.shared=true", []),
    ],
)
def test_a_setting_counts_for_the_stages_that_read_it(chain: Path, override: str, stages: list[str]) -> None:
    run(chain)
    assert list(due(chain, override)) == stages


@pytest.mark.parametrize(
    ("edited", "stages"),
    [
        ("pipelines.sources.csv", ["ingest", "score"]),
        ("pipelines.sources.idx", []),
        ("pipelines.features.fit", ["features"]),
        ("pipelines.classic", ["classic"]),
        ("pipelines.models.mlp", ["train"]),
        ("pipelines.models.cnn", []),
        ("pipelines.stream.reader", ["train"]),
        ("pipelines.train.worker", ["train"]),
        ("pipelines.gate", ["evaluate", "register"]),
        ("pipelines.plots", ["classic", "evaluate"]),
        ("pipelines.cli", []),
    ],
)
def test_an_edited_module_counts_for_the_stages_that_use_it(
    chain: Path, monkeypatch: pytest.MonkeyPatch, edited: str, stages: list[str]
) -> None:
    source_of = receipt_module._source_of

    def edit(module: str) -> bytes | None:
        source = source_of(module)
        return source + b"\n# edited" if source and module == edited else source

    run(chain)
    monkeypatch.setattr(receipt_module, "_source_of", edit)
    found = due(chain)
    assert list(found) == stages and all(f"module {edited}" in parts for parts in found.values())


@pytest.mark.parametrize(
    ("path", "stages"),
    [("tables/chain/predictions", ["score"]), ("models/chain/LogisticRegression", ["classic", "evaluate"])],
)
def test_a_deleted_output_is_made_again(chain: Path, capsys: Capture, path: str, stages: list[str]) -> None:
    run(chain)
    capsys.readouterr()
    shutil.rmtree(chain.parent / "lake" / path)
    run(chain)
    out = capsys.readouterr().out
    assert ran(out)[: len(stages)] == stages and "is gone" in out
    run(chain)
    assert not ran(capsys.readouterr().out)


def test_a_new_raw_file_runs_everything(chain: Path, capsys: Capture, rows_csv: Rows) -> None:
    run(chain)
    capsys.readouterr()
    (chain.parent / "raw" / "more.csv").write_text(rows_csv(100, seed=5))
    receipts = run(chain)
    assert ran(capsys.readouterr().out) == ALL
    assert receipts["score"].rows == 400
    against = receipts["evaluate"].result["against"]
    assert against["version"] >= 1 and against["difference"]["rows"] == receipts["evaluate"].result["rows"]["test"]


def test_a_rollback_scores_with_the_version_before_and_stays(chain: Path, capsys: Capture, spark: SparkSession) -> None:
    run(chain)
    capsys.readouterr()
    before, now = rollback("chain")
    assert now < before
    receipts = run(chain)
    out = capsys.readouterr().out
    assert ran(out) == ["register", "score"] and f"version {now} stays champion" in out
    assert receipts["register"].result["version"] == now == receipts["score"].result["model_version"]
    rows = spark.read.format("delta").load(str(table_path("chain", "predictions")))
    assert [row[0] for row in rows.select("model_version").distinct().collect()] == [now]
    run(chain)
    assert not ran(capsys.readouterr().out), "the rollback is not undone"
    rollback("chain", to=before)
    with pytest.raises(LakeError, match="wanted version 99 of chain, seen versions 1"):
        rollback("chain", to=99)
    run(chain)


def test_a_refusal_registers_nothing(chain: Path, capsys: Capture) -> None:
    run(chain)
    versions = tracking.versions("chain")
    with pytest.raises(Refused, match=r"auc: wanted >= 1\.01, seen .*; nothing was registered"):
        run(chain, overrides=("gate.require={auc: {min: 1.01}}",))
    assert tracking.versions("chain") == versions
    evaluation = read_receipt(receipt_path("chain", "evaluate"))
    assert evaluation is not None and not evaluation.result["verdict"]["passed"]
    assert "the gate refused" in capsys.readouterr().out


def test_each_version_carries_where_it_came_from(chain: Path) -> None:
    client = tracking.mlflow_client()
    newest = max(client.search_model_versions("name = 'chain'"), key=lambda v: int(v.version))
    tags = newest.tags
    assert Path(tags["headrace.delta_path"]) == table_path("chain", "features/train")
    assert int(tags["headrace.delta_version"]) >= 0 and len(tags["headrace.file_digest"]) == 64
    assert json.loads(tags["headrace.verdict"])["passed"] and json.loads(tags["headrace.features"])["inputs"]
    assert tags["headrace.code_version"]


def test_a_transform_too_long_for_a_tag_is_named(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receipts = {name: read_receipt(receipt_path("chain", name)) for name in ("features", "evaluate")}
    assert receipts["features"] is not None and receipts["evaluate"] is not None
    verdict = Verdict.model_validate(receipts["evaluate"].result["verdict"])
    monkeypatch.setattr(register, "_TAG_CHARACTERS", 100)
    ref = ModelRef.model_validate(receipts["evaluate"].result["model"])
    tag = json.loads(register._tags(SimpleNamespace(inputs=receipts), ref, verdict)["headrace.features"])
    fitted = FittedFeatures.model_validate(receipts["features"].result["fitted"])
    assert tag == {"digest": fitted.digest, "file": "headrace.json"}


def test_an_audit_derives_again_what_trained_a_run(chain: Path) -> None:
    receipt = read_receipt(receipt_path("chain", "train"))
    assert receipt is not None
    audit = audit_run(receipt.run_id)
    assert audit.differences == [] and len(audit.epochs) == len(receipt.result["epochs"])
    assert audit.snapshot.rows == receipt.result["epochs"][0]["rows"]
    client = tracking.mlflow_client()
    parent = client.get_run(receipt.run_id).data.tags["mlflow.parentRunId"]
    assert audit_run(parent).run_id == receipt.run_id and "each of these rows once" in as_text(audit)
    client.set_tag(receipt.run_id, "headrace.training.row_digest", "1:0")
    assert "row_digest: the run recorded 1:0" in "".join(audit_run(receipt.run_id).differences)
    client.set_tag(receipt.run_id, "headrace.training.row_digest", audit.snapshot.row_digest)
    with pytest.raises(TrackingError, match="run nope: "):
        audit_run("nope")


def test_an_audit_tells_which_models_saw_a_row(chain: Path) -> None:
    config: Any = load_config(chain)
    raw, training = (Snapshot.open(table_path("chain", name)) for name in ("raw", "features/train"))
    rows = [row for path in raw.paths() for row in pq.read_table(path).to_pylist()]
    trained = {
        row["row_id"] for path in training.paths() for row in pq.read_table(path, columns=["row_id"]).to_pylist()
    }
    for row in (next(r for r in rows if r["row_id"] in trained), next(r for r in rows if r["row_id"] not in trained)):
        audit = audit_row(config, f"{row['_file']}:{row['_line']}")
        assert audit.row_id == row["row_id"] and audit.is_raw and audit.sightings
        assert audit.sightings[0].saw == (audit.row_id in trained), "the newest version"
    assert not audit_row(config, "rows.csv:99999").is_raw
    with pytest.raises(ConfigError, match="wanted FILE:LINE or row_id=NUMBER"):
        audit_row(config, "17")


def test_runs_in_mlflow(chain: Path) -> None:
    client = tracking.mlflow_client()
    experiment = client.get_experiment_by_name("chain")
    runs = client.search_runs([experiment.experiment_id], max_results=500)
    assert {run.info.status for run in runs} <= {"FINISHED", "FAILED"}, "none is left running"
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    first = parents[-1]
    children = {run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == first.info.run_id}
    assert list(children) == ALL[::-1], "a child run a stage, newest first"
    assert [a.path for a in client.list_artifacts(first.info.run_id)] == ["config.yaml"]
    plots = {a.path for a in client.list_artifacts(children["evaluate"].info.run_id)}
    assert {
        "leaderboard.png",
        "roc.png",
        "ks.png",
        "confusion.png",
        "calibration.png",
        "scores.png",
        "receipt.json",
    } <= plots
    assert "loss.png" in {a.path for a in client.list_artifacts(children["train"].info.run_id)}
    losses = client.get_metric_history(children["train"].info.run_id, "train/loss")
    assert [metric.step for metric in losses] == [1, 2]
    (dataset,) = children["train"].inputs.dataset_inputs
    assert dataset.dataset.name == "features_train"
    assert children["train"].data.tags["headrace.training.delta_version"] == "0"
    assert children["train"].data.params["batch_size"] == "16"


def test_a_second_run_at_the_same_time_is_refused(chain: Path) -> None:
    with only_one("chain"), pytest.raises(LakeError, match=r"another run of chain is at work \(process \d+\)"):
        run(chain, "ingest")


def test_a_stage_without_its_inputs_names_the_command(chain: Path, lake: Path) -> None:
    with pytest.raises(LakeError, match="run `make ingest W=chain` first"):
        run(chain, "features")
    with pytest.raises(LakeError, match="run `make ingest W=chain` first"):
        run(chain, "score")


def test_unseen_categories_and_new_files_at_scoring_time(chain: Path, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("1,2,purple,0\n,,red,1\n3,4,,0\n")
    receipt = run(chain, "score", overrides=(f"score.paths={tmp_path}/new.csv",))["score"]
    assert receipt.rows == 3 and receipt.result["unseen"] == {"color": 2}
    (tmp_path / "new.csv").write_text("1,2,purple\n")
    with pytest.raises(LakeError, match=r"score\.paths: new\.csv line 1: wanted 4 fields"):
        run(chain, "score", overrides=(f"score.paths={tmp_path}/new.csv",))


def test_old_pipeline_runs_are_removed_by_the_stated_rule(chain: Path) -> None:
    config: Any = load_config(chain)
    client = tracking.mlflow_client()
    experiment = client.get_experiment_by_name("chain").experiment_id
    registered = {version.run_id for version in client.search_model_versions("name = 'chain'")}
    assert tracking.prune_runs(config.workload, keep=1) > 0
    left = {run.info.run_id for run in client.search_runs([experiment], max_results=500)}
    assert registered <= left, "runs with a registered model stay"
