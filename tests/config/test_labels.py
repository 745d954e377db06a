"""A label that does not fit its column, its models or its metrics is refused before anything starts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import load_config
from pipelines.errors import ConfigError

SCHEMA = "a double, text string, n int, seen boolean, tags array<string>, scores array<double>"
COUNT = {"column": "n", "kind": "count"}
MULTILABEL = {"column": "tags", "kind": "multilabel"}
SURVIVAL = {"column": "n", "kind": "survival", "event": "seen"}
LABELS = {"count": COUNT, "multilabel": MULTILABEL, "survival": SURVIVAL}
CLASSIC = {"count": "LinearRegression", "survival": "AFTSurvivalRegression"}


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


@pytest.mark.parametrize(
    ("kind", "metric"), [("count", "poisson_deviance"), ("multilabel", "f1_micro"), ("survival", "concordance")]
)
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
        ({"column": "n", "kind": "survival"}, {}, "'event', the column that is 1 where the event was seen, belongs to"),
        (COUNT | {"event": "seen"}, {}, "belongs to a survival label and to no other, seen 'seen' with kind 'count'"),
        (SURVIVAL | {"event": "n"}, {}, "event: wanted another column than the time, seen 'n' twice"),
        (SURVIVAL | {"event": "sen"}, {}, "features.label.event: a column of the schema"),
        (SURVIVAL | {"event": "text"}, {}, "features.label.event: wanted a number or a boolean, seen 'text', string"),
        (SURVIVAL | {"event": "a"}, {}, "features.inputs.x.columns: wanted inputs, seen the label 'a'"),
        (
            SURVIVAL,
            {"model": {"network": "mlp"}},
            "model: no network learns a survival label; use AFTSurvivalRegression",
        ),
        (SURVIVAL, {"classic": [{"estimator": "GBTRegressor"}]}, "GBTRegressor does not fit a survival label"),
        (COUNT, {"classic": [{"estimator": "AFTSurvivalRegression"}]}, "AFTSurvivalRegression does not fit a count"),
        (SURVIVAL, {"gate": {"metric": "rmse"}}, "a metric of a survival label"),
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


TEXT = {"columns": ["text"], "steps": ["tokens", "vocabulary", {"sequence": {"length": 9}}]}
HASHED = {"columns": ["text"], "steps": ["tokens", {"hash": {"buckets": 9}}, {"sequence": {"length": 9}}]}
TAGS = {"columns": ["tags"], "steps": ["vocabulary", {"sequence": {"length": 9}}]}
NUMBER = {"columns": ["a"], "steps": ["standardize"]}


def next_token(inputs: dict[str, Any], **others: Any) -> dict[str, Any]:
    label = {"column": "text", "kind": "next_token"}
    found = sections(label, model={"network": "gpt"}, **{"classic": [], **others})
    return found | {"features": {"label": label, "inputs": inputs}}


def test_a_sequence_is_its_own_label(workload: Callable[..., Path]) -> None:
    config = load_config(workload("", **next_token({"x": TEXT}, train={"early_stopping": {"metric": "perplexity"}})))
    assert config.gate_metric == "log_loss"


@pytest.mark.parametrize(
    ("inputs", "others", "message"),
    [
        ({"x": TEXT, "y": NUMBER}, {}, "inputs: wanted one for a next_token label, of column 'text'"),
        ({"x": HASHED}, {}, "with the steps 'vocabulary' and 'sequence', seen {'x': ('text', 'tokens', 'hash'"),
        ({"x": TAGS}, {}, "of column 'text' with the steps"),
        (
            {"x": TEXT},
            {"model": {"network": "mlp"}},
            "a network that learns a next_token label, one of gpt, seen 'mlp'",
        ),
        ({"x": TEXT}, {"class_weights": "balanced"}, "class_weights: wanted a binary or multiclass label"),
        (
            {"x": TEXT},
            {"classic": [{"estimator": "LogisticRegression"}]},
            "classic: MLlib has no estimator of a next_token label; use a 'model'",
        ),
        ({"x": TEXT}, {"gate": {"metric": "auc"}}, "a metric of a next_token label"),
    ],
)
def test_what_does_not_foretell(
    workload: Callable[..., Path], inputs: dict[str, Any], others: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(workload("", **(next_token(inputs) | others)))
    assert message in str(refused.value), str(refused.value)


def test_a_decoder_learns_nothing_else(workload: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="a network that learns a count label, one of cnn, .* seen 'gpt'"):
        load_config(workload("", **sections(COUNT, model={"network": "gpt"})))
