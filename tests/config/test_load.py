"""A workload's file is checked before anything starts, and each error names file, key, wanted and seen."""

from pathlib import Path

import pytest

from pipelines.config import load_config
from pipelines.errors import ConfigError

DIGITS = "conf/digits.yaml"


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(DIGITS, overrides)
    return str(caught.value)


def test_defaults_and_overrides() -> None:
    config = load_config(DIGITS, ["train.epochs=3", "classic.0.maxIter=7", "seed=5"])
    assert config.train.epochs == 3 and config.classic[0].params["maxIter"] == 7 and config.seed == 5
    assert config.train.num_lanes == 16, "the largest divisor of 64 that is at most 16"
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 6  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.epoch=3", ["train.epoch: unknown key", "did you mean 'epochs'"]),
        ("wrkload=x", ["wrkload: unknown key", "did you mean 'workload'"]),
        ("train.epochs=ten", ["train.epochs", "integer", "seen 'ten'"]),
        ("train.epochs=0", ["train.epochs", "greater than or equal to 1", "seen 0"]),
        ("features.label.kind=binari", ["features.label.kind", "'binary'", "seen 'binari'"]),
        ("classic.0.maxIters=3", ["a parameter of LogisticRegression", "did you mean 'maxIter'"]),
        ("classic.0.estimator=LogisticRegresion", ["an estimator", "did you mean 'LogisticRegression'"]),
        ("classic.1={estimator: LogisticRegression}", ["each estimator once"]),
        ("classic.0.estimator=LinearRegression", ["LinearRegression does not fit a multiclass label"]),
        (
            "classic.0={estimator: GBTClassifier, validationTol: 0.1}",
            ["validationTol: wanted a binary, real or count label"],
        ),
        ("classic.0={estimator: KMeans, k: 3}", ["KMeans takes no label", "seen one of kind multiclass"]),
        ("classic.0={estimator: LogisticRegression, inputs: [imag]}", ["classic.0.inputs", "did you mean 'image'"]),
        ("classic.0={estimator: LogisticRegression, inputs: []}", ["classic.0.inputs", "at least 1 item"]),
        ("class_weights=balance", ["class_weights", "'balanced'", "seen 'balance'"]),
        ("class_weights={0: 0}", ["class_weights", "greater than 0"]),
        ("model.network=cn", ["a network", "did you mean 'cnn'"]),
        ("model.chanels=[1]", ["a parameter of cnn", "did you mean 'channels'"]),
        ("train.optimizer=Adm", ["an optimizer", "did you mean 'Adam'"]),
        ("train.optimizer={name: SGD, momentums: 1}", ["a parameter of SGD", "did you mean 'momentum'"]),
        ("train.schedule=CosineAnealing", ["a schedule", "did you mean 'CosineAnnealingLR'"]),
        ("train.lanes=7", ["batch_size: wanted a multiple of 7 lanes, seen 64; nearest: 63"]),
        ("train.lanes=1", ["lanes: wanted at least the 2 ranks, seen 1"]),
        ("train.batch_size=1", ["batch_size", "nearest: 2"]),
        ("source.schema=image binry, digit int", ["'binry'", "did you mean 'binary'"]),
        ("source.format=csvv", ["source.format", "'csv'", "seen 'csvv'"]),
        ("source.options={header: true}", ["an option of idx", "'header'"]),
        ("source.format=text", ["wanted columns of types ['string'] for text", "seen ['binary', 'int']"]),
        ("features.label.column=digits", ["features.label.column", "did you mean 'digit'"]),
        ("features.inputs.image.columns=[imag]", ["features.inputs.image.columns", "did you mean 'image'"]),
        ("features.inputs.image.steps=[standardize]", ["wanted type int", "seen binary"]),
        ("features.inputs.image.steps=[{image: {shape: [8]}}]", ["[height, width]", "seen [8]"]),
        ("features.inputs.x={columns: [digit]}", ["wanted inputs, seen the label 'digit'"]),
        ("split.hash.shares={train: 0.8, test: 0.3}", ["add up to 1", "seen 1.1"]),
        ("split.hash.shares={train: 0.8, tset: 0.2}", ["named train and test"]),
        ("split.validation=null", ["split.validation: wanted", "3 candidates"]),
        ("gate.metric=auc", ["a metric of a multiclass label", "seen 'auc'"]),
        ("gate.require={acuracy: {min: 1}}", ["'accuracy'", "seen 'acuracy'"]),
        ("score.split=tst", ["a split or 'all'", "did you mean 'test'"]),
        ("source.max_rejected=2", ["less than or equal to 1", "seen 2"]),
        ("seed=-1", ["seed", "greater than or equal to 0", "seen -1"]),
        (
            "train.strategy={name: local_sgd, every_step: 3}",
            ["train.strategy.every_step", "did you mean 'every_steps'"],
        ),
        ("train.strategy={name: sharded, size: 2}", ["train.strategy.size: unknown key (known: name)"]),
        ("train.strategy={name: data_parallel, hook: {name: topk, shar: 1}}", ["strategy.hook.shar", "'share'"]),
        ("seed=20240101123456", ["seed", "less than 4294967296"]),
    ],
)
def test_wrong_values_are_named(override: str, parts: list[str]) -> None:
    message = refused(override)
    assert message.startswith(DIGITS)
    for part in parts:
        assert part in message, message


def test_line_of_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(Path(DIGITS).read_text().replace("epochs: 20", "epochs: many"))
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "many" in text)
    with pytest.raises(ConfigError, match=rf"w\.yaml:{line}: train\.epochs"):
        load_config(path)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        (
            "classic.0={estimator: LogisticRegression}",
            "LogisticRegression learns a label: wanted features.label, seen none",
        ),
        ("model={network: mlp}", "model: a network learns a label: wanted features.label, seen none"),
        ("class_weights=balanced", "class_weights: wanted a binary or multiclass label, seen kind 'none'"),
        (
            "gate.metric=accuracy",
            "a metric of clusters, one of log_likelihood, perplexity, silhouette, seen 'accuracy'",
        ),
        (
            "features.inputs.image={columns: [digit], steps: [target]}",
            "'target' takes a binary, real or count label, seen none",
        ),
    ],
)
def test_what_wants_a_label_is_refused_without_one(override: str, part: str) -> None:
    without = ("features.label=null", "model=null", "classic=[{estimator: KMeans, k: 3}]", "gate={}")
    config = load_config(DIGITS, without)
    assert config.gate_metric == "silhouette" and config.features.label_kind == "none"
    assert part in refused(*without, override)


def test_weights_that_an_estimator_does_not_take() -> None:
    perceptron = "classic.0={estimator: MultilayerPerceptronClassifier, layers: [64, 10]}"
    assert "MultilayerPerceptronClassifier takes no weights" in refused(perceptron, "class_weights=balanced")


def test_settings_that_do_not_fit_each_other_are_where_one_was_set() -> None:
    message = refused("train.balance=auto", "train.strategy=gossip")
    assert message.startswith(f"{DIGITS} with --set: train: balance: wanted off with gossip")


def test_every_problem_is_listed() -> None:
    assert len(refused("train.epochs=ten", "train.lr=-1").splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("workload: [", "wanted YAML"),
        ("- a\n- b\n", "a mapping of sections"),
        ("workload: a\nworkload: b\n", "'workload' stands twice"),
        ("workload: tiny\n", "source: wanted, seen nothing"),
        ("workload: ${NOT_SET_ANYWHERE}\n", "NOT_SET_ANYWHERE"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"w\.yaml") as caught:
        load_config(path)
    assert part in str(caught.value)


def test_a_missing_file_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        load_config("conf/digit.yaml")


@pytest.mark.parametrize("override", ["novalue", "=1", "classic.9.maxIter=1", "train={"])
def test_overrides_that_cannot_be_applied(override: str) -> None:
    assert refused(override).startswith("--set")


def test_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    text = Path(DIGITS).read_text()
    path.write_text(text.replace("${HEADRACE_LAKE}/raw/digits", "${MY_DATA:-/somewhere}/x"))
    assert str(load_config(path).source.paths).startswith("['/somewhere/x")
    monkeypatch.setenv("MY_DATA", "/else")
    assert str(load_config(path).source.paths).startswith("['/else/x")
    monkeypatch.setenv("MY_DATA", "")  # as in the shell, empty is unset
    assert str(load_config(path).source.paths).startswith("['/somewhere/x")


def test_a_lake_whose_path_is_a_pattern_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEADRACE_LAKE", str(tmp_path / "of [a]"))
    with pytest.raises(ConfigError, match=r"HEADRACE_LAKE: wanted .*, seen \[ \] in .*of \[a\]; take one without"):
        load_config(DIGITS)
