"""A label that does not fit its column, its models or its metrics is refused before anything starts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import load_config
from pipelines.errors import ConfigError

SCHEMA = "a double, text string, n int, tags array<string>, scores array<double>"
COUNT = {"column": "n", "kind": "count"}
MULTILABEL = {"column": "tags", "kind": "multilabel"}
LABELS = {"count": COUNT, "multilabel": MULTILABEL}
CLASSIC = {"count": "LinearRegression"}


def sections(label: dict[str, Any], **others: Any) -> dict[str, Any]:
    inputs = {"x": {"columns": ["a"], "steps": ["standardize"]}}
    source = {"format": "parquet", "paths": "x.parquet", "schema": SCHEMA}
    classic = [{"estimator": CLASSIC[label["kind"]]}] if label["kind"] in CLASSIC else []
    model = {"network": "mlp"} if label["kind"] == "multilabel" else None
    split = {"hash": {"shares": {"train": 0.8, "test": 0.2}}, "validation": {"share": 0.1}}
    return {
        "source": source,
        "features": {"label": label, "inputs": inputs},
        "classic": classic,
        "model": model,
        "split": split,
        **others,
    }


@pytest.mark.parametrize(("kind", "metric"), [("count", "poisson_deviance"), ("multilabel", "f1_micro")])
def test_a_kind_has_a_metric_of_its_own(workload: Callable[..., Path], kind: str, metric: str) -> None:
    config = load_config(workload("", **sections(LABELS[kind])))
    assert config.gate_metric == config.tune_metric == metric


@pytest.mark.parametrize(
    ("label", "others", "message"),
    [
        (
            COUNT | {"column": "text"},
            {},
            "features.label.column: wanted type int or bigint or float or double for a count",
        ),
        ({"column": "text", "kind": "real"}, {}, "features.label.column: wanted type int"),
        ({"column": "scores", "kind": "multiclass"}, {}, "for a multiclass label, seen 'scores', array<double>"),
        (COUNT | {"positive": [1]}, {}, "'positive' and 'negative' belong to a binary label"),
        (COUNT, {"classic": [{"estimator": "LogisticRegression"}]}, "LogisticRegression does not fit a count label"),
        (COUNT, {"class_weights": "balanced"}, "class_weights: wanted a binary or multiclass label, seen kind 'count'"),
        (COUNT, {"gate": {"metric": "r2"}}, "a metric of a count label"),
        (COUNT, {"tune": {"metric": "auc", "spaces": {"LinearRegression": {"regParam": [1]}}}}, "a metric of a count"),
        (
            MULTILABEL | {"column": "text"},
            {},
            "wanted type array<string> or array<int> or array<bigint> for a multilabel",
        ),
        (
            MULTILABEL,
            {"classic": [{"estimator": "LogisticRegression"}]},
            "classic: MLlib has no estimator of a multilabel label; use a 'model', or a workload for each class",
        ),
        (MULTILABEL, {"class_weights": "balanced"}, "wanted a binary or multiclass label, seen kind 'multilabel'"),
        (MULTILABEL, {"gate": {"metric": "accuracy"}}, "a metric of a multilabel label"),
        (COUNT | {"classes": [1]}, {}, "'classes' belongs to a multiclass or multilabel label, seen kind 'count'"),
        (
            COUNT,
            {"train": {"early_stopping": {"metric": "acuracy"}}},
            "train.early_stopping.metric: a metric of a count label, one of loss, mae, poisson_deviance, rmse",
        ),
    ],
)
def test_what_does_not_fit(
    workload: Callable[..., Path], label: dict[str, Any], others: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(workload("", **sections(label, **others)))
    assert message in str(refused.value), str(refused.value)
