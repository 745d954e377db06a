"""What a search cannot try is refused when the config is read."""

import json
import re
from pathlib import Path

import pytest
import yaml

from pipelines.config import load_config
from pipelines.config.tuning import Range, num_points
from pipelines.errors import ConfigError

GRID = "search: grid, spaces"


def digits(tune: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config("conf/digits.yaml", [f"tune={{{tune}}}", *overrides])
    return str(caught.value)


@pytest.mark.parametrize(
    ("tune", "parts"),
    [
        ("spaces: {}", ["tune.spaces", "at least 1"]),
        ("spaces: {model: {}}", ["spaces.model: wanted a parameter, seen none"]),
        ("spaces: {LogisticRegresion: {regParam: [0.1]}}", ["a section that the config has", "'LogisticRegression'?"]),
        ("spaces: {GBTClassifier: {maxDepth: [3]}}", ["a section that the config has", "seen 'GBTClassifier'"]),
        ("spaces: {LogisticRegression: {regparam: [0.1]}}", ["tune.spaces.LogisticRegression", "mean 'regParam'"]),
        ("spaces: {model: {chanels: [[3]]}}", ["a parameter of cnn", "did you mean 'channels'"]),
        ("spaces: {train: {Ir: [0.1]}}", ["tune.spaces.train: a setting", "did you mean 'lr'"]),
        ("spaces: {train: {ranks: [1, 2]}}", ["a setting that changes what is learned", "seen 'ranks'"]),
        ("spaces: {train: {lr: [0.1, fast]}}", ["tune.spaces.train.lr: wanted a valid number", "seen 'fast'"]),
        ("spaces: {train: {batch_size: [1]}}", ["tune.spaces.train.batch_size", "nearest: 2", "seen 1"]),
        ("spaces: {train: {optimizer.weight_dekay: [0.1]}}", ["a parameter of Adam", "did you mean 'weight_decay'"]),
        ("spaces: {train: {lr: 0.1}}", ["wanted a list of values, or {low: ..., high: ...}, seen 0.1"]),
        ("spaces: {train: {lr: []}}", ["wanted a list of values, or {low: ..., high: ...}, seen []"]),
        ("spaces: {train: {lr: {low: 0.1, hihg: 1}}}", ["lr.hihg: unknown key; did you mean 'high'"]),
        ("spaces: {train: {lr: {low: 0.1, high: 0.01}}}", ["wanted low below high, seen 0.1 and 0.01"]),
        ("spaces: {train: {lr: {low: 0.0, high: 0.01, log: true}}}", ["low: wanted above 0 with log, seen 0.0"]),
        (GRID + ": {train: {lr: {low: 0.1, high: 1.0}}}", ["spaces.train.lr: a grid wants a list"]),
        ("trials: 9, " + GRID + ": {train: {lr: [0.1], epochs: [1, 2]}}", ["a grid tries all", "model has 2"]),
        ("metric: auc, spaces: {train: {lr: [0.1]}}", ["tune.metric: a metric of a multiclass label", "seen 'auc'"]),
        ("search: bayes, spaces: {train: {lr: [0.1]}}", ["tune.search", "seen 'bayes'"]),
        ("folds: 1, spaces: {train: {lr: [0.1]}}", ["tune.folds", "greater than or equal to 2"]),
    ],
)
def test_refusals(tune: str, parts: list[str]) -> None:
    message = digits(tune)
    assert len(message.splitlines()) == 1 or "unknown key" in message
    for part in ("conf/digits.yaml", *parts):
        assert part in message


def test_the_validation_split_is_needed_without_folds() -> None:
    without = ("split.validation=null", "classic=[]", "train.early_stopping=null")
    assert "or set tune.folds" in digits("spaces: {train: {lr: [0.1]}}", *without)
    load_config("conf/digits.yaml", ["tune={folds: 3, spaces: {train: {lr: [0.1]}}}", *without])


def test_values_of_a_range() -> None:
    assert Range(low=1, high=3).values == [1, 2, 3] and Range(low=1, high=8, step=3).values == [1, 4, 7]
    assert Range(low=0.0, high=0.3, step=0.1).values == pytest.approx([0, 0.1, 0.2, 0.3])
    assert Range(low=0.0, high=1.0).values is None and num_points({"x": Range(low=0.0, high=1.0), "y": [1]}) is None
    assert num_points({"x": Range(low=1, high=3), "y": [[1], [2]]}) == 6


def test_a_number_without_a_point_is_a_number() -> None:
    config = load_config("conf/digits.yaml", ["tune={spaces: {LogisticRegression: {regParam: [1e-4, 0.1]}}}"])
    assert config.tune is not None and config.tune.spaces["LogisticRegression"]["regParam"] == [1e-4, 0.1]


def test_what_was_found_stands_in_the_sections() -> None:
    config = load_config("conf/digits.yaml")
    best = {
        "LogisticRegression": {"regParam": 0.5},
        "model": {"channels": [8]},
        "train": {"optimizer.weight_decay": 0.1},
    }
    tuned = config.tuned(best)
    assert tuned.classic[0].params == {"maxIter": 50, "regParam": 0.5} and tuned.classic[1] == config.classic[1]
    assert tuned.model is not None and tuned.model.params == {"channels": [8], "hidden": 64, "dropout": 0.2}
    assert tuned.train.optimizer.params == {"weight_decay": 0.1} and tuned.train.lr == config.train.lr


def test_the_documented_example_is_one() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", Path("docs/tuning.md").read_text(), re.S)
    config = load_config("conf/adult.yaml", [f"tune={json.dumps(yaml.safe_load(block)['tune'])}"])
    assert config.tune is not None and list(config.tune.candidates()) == ["GBTClassifier", "model"]
