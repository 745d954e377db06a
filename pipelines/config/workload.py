"""The whole config of a workload, and the sections of what happens after training."""

import re
from collections.abc import Mapping
from datetime import time
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from pipelines.config import catalog
from pipelines.config.base import Name, Positive, Section, Strings, known_name
from pipelines.config.data import NUMERIC, Source
from pipelines.config.features import DATES, LIST_TYPES, Features, Input, Label
from pipelines.config.learning import Estimator, Model, Train
from pipelines.config.mining import Mine, check_mine
from pipelines.config.recommend import RANKED, Recommend
from pipelines.config.split import Split, utc
from pipelines.config.tuning import Tune, check_spaces, with_values

Metric = Literal[
    "accuracy",
    "f1_micro",
    "f1_macro",
    "hamming_loss",
    "log_loss",
    "auc",
    "pr_auc",
    "ks",
    "concordance",
    "poisson_deviance",
    "rmse",
    "mae",
    "r2",
    "silhouette",
    "log_likelihood",
    "perplexity",
    "ndcg",
    "recall",
    "coverage",
]
METRICS: tuple[Metric, ...] = get_args(Metric)
OF_CLUSTERS: tuple[Metric, ...] = ("silhouette", "log_likelihood", "perplexity")
LOWER_IS_BETTER = frozenset({"hamming_loss", "log_loss", "poisson_deviance", "rmse", "mae", "perplexity"})
METRICS_OF: dict[str, tuple[Metric, ...]] = {  # by kind of label; the first one is the gate's where it names none
    "binary": ("auc", "accuracy", "log_loss", "pr_auc", "ks"),
    "multiclass": ("accuracy", "log_loss"),
    "multilabel": ("f1_micro", "f1_macro", "hamming_loss", "log_loss"),
    "real": ("rmse", "mae", "r2"),
    "count": ("poisson_deviance", "rmse", "mae"),
    "survival": ("concordance",),
    "next_token": ("log_loss", "perplexity", "accuracy"),
    "none": OF_CLUSTERS,
}


class Bounds(Section):
    """Limits of a metric."""

    min: float | None = Field(default=None, description="Refused below.")
    max: float | None = Field(default=None, description="Refused above.")


class Gate(Section):
    """What a candidate must reach on the test split before it is registered."""

    metric: Metric | None = Field(
        default=None,
        description="Picks the candidate on the validation split. Default: ndcg with `recommend`, else that of the label's "
        "kind: auc (binary), accuracy (multiclass), f1_micro (multilabel), rmse (real), poisson_deviance (count), "
        "concordance (survival), log_loss (next_token); silhouette without one.",
    )
    require: dict[Metric, Bounds] = Field(default={}, description="Bounds on test metrics.")
    champion_confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = Field(
        default=0.95,
        description="Refused when a paired bootstrap says, with this confidence, that the champion is better.",
    )
    slices: list[Name] = Field(default=[], description="Columns of the source by whose values metrics are shown.")


class Score(Section):
    """Batch inference on Spark with the champion."""

    paths: Strings | None = Field(
        default=None, description="Raw files to score, in the source's format. Default: the rows of `split`."
    )
    split: str = Field(default="all", description="Without `paths`: which ingested rows to score; a split, or all.")
    alias: Name = Field(default="champion", description="The alias of the registered model that scores.")


class Keep(Section):
    """What is kept; the rest is removed when a later run has finished."""

    checkpoints: Positive = Field(default=2, description="Checkpoints of a training run, the best one beside them.")
    runs: Positive = Field(
        default=20, description="Finished pipeline runs a workload in MLflow; those with a registered model stay."
    )


class LakeOptions(Section):
    """Where the lake is."""

    shared: bool = Field(default=False, description="All nodes of the cluster see the lake under the same path.")


class Config(Section):
    """One workload, whole."""

    workload: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")] = Field(
        description="Its name: tables, runs and the registered model carry it."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(  # numpy takes no other
        default=0, description="The one seed of splits, row order, estimators and networks."
    )
    source: Source = Field(description="Raw data.")
    split: Split = Field(default=Split(), description="Train, validation and test.")
    features: Features = Field(description="The fitted transform.")
    recommend: Recommend | None = Field(
        default=None, description="Which inputs are users and items of a recommendation."
    )
    class_weights: Literal["balanced"] | dict[str | int, Annotated[float, Field(gt=0)]] | None = Field(
        default=None,
        description="How much a row of each class counts in training, for MLlib and torch alike: balanced, so that all "
        "classes count the same together, or a weight a class, 1 where none is given (a binary label's are 0 and 1). They "
        "are scaled to 1 on average. Probabilities are then no longer those of the data.",
    )
    classic: list[Estimator] = Field(default=[], description="MLlib estimators to fit.")
    model: Model | None = Field(default=None, description="A torch network to train.")
    train: Train = Field(default=Train(), description="How the network is trained.")
    tune: Tune | None = Field(default=None, description="The search for better parameters of both.")
    mine: Mine | None = Field(
        default=None, description="What is found without a model: frequent patterns, near duplicates, communities."
    )
    gate: Gate = Field(default=Gate(), description="What a candidate must reach.")
    score: Score = Field(default=Score(), description="Batch inference.")
    keep: Keep = Field(default=Keep(), description="What is kept.")
    lake: LakeOptions = Field(default=LakeOptions(), description="Where the lake is.")

    @model_validator(mode="after")
    def _splits(self) -> "Config":
        if self.split.given:
            if set(self.split.given) != set(self.source.splits):
                raise ValueError(
                    f"split.given: wanted the names in source.paths ({', '.join(self.source.splits) or 'none'}), "
                    f"seen {', '.join(self.split.given)}"
                )
        elif self.source.splits:
            raise ValueError("split.given: wanted, because source.paths names splits; seen none")
        if self.candidates > 1 and "validation" not in self.split.names:
            raise ValueError(
                f"split.validation: wanted, because {self.candidates} candidates are compared on it; seen none"
            )
        if self.train.early_stopping and "validation" not in self.split.names:
            raise ValueError("split.validation: wanted, because train.early_stopping watches it; seen none")
        if self.split.by_last and not self.features.refit:
            raise ValueError(
                "features.refit: wanted true with split.last, whose rows move when others arrive; seen false"
            )
        if self.score.split not in ("all", *self.split.names):
            known_name("score.split: a split or 'all'", self.score.split, ["all", *self.split.names])
        return self

    @model_validator(mode="after")
    def _columns(self) -> "Config":
        label = self.features.label
        if label:
            self._check_label(label)
        columns = list(self.source.ingested)
        for name, group in self.features.inputs.items():
            others = [step.other for step in group.steps if step.other]
            for column in group.weights:
                known_name(f"features.inputs.{name}.steps: bag: weights: a column of the schema", column, columns)
                if not re.match(r"array<(?!string)", self.source.ingested[column]):
                    raise ValueError(
                        f"features.inputs.{name}.steps: bag: weights: column {column!r}: wanted a list of numbers, seen "
                        f"{self.source.ingested[column]}"
                    )
            for column in (*group.columns, *others):
                known_name(f"features.inputs.{name}.columns: a column of the schema", column, columns)
                if label and column in label.columns and label.kind != "next_token":
                    raise ValueError(f"features.inputs.{name}.columns: wanted inputs, seen the label {column!r}")
                self._check_type(name, column, self.source.ingested[column], group)
        for where, names in (
            ("gate.slices", self.gate.slices),
            ("split.hash.by" if self.split.by_hash else "split.entity", self.split.hashed),
            ("split.last", [self.split.by_last.by, self.split.by_last.order] if self.split.by_last else []),
        ):
            for column in names:
                known_name(f"{where}: a column of the schema", column, columns)
        return self

    def _check_label(self, label: Label) -> None:
        known_name("features.label.column: a column of the schema", label.column, [*self.source.columns])
        if label.event:
            known_name("features.label.event: a column of the schema", label.event, [*self.source.columns])
            if (dtype := self.source.columns[label.event]) not in (*NUMERIC, "boolean"):
                raise ValueError(f"features.label.event: wanted a number or a boolean, seen {label.event!r}, {dtype}")
        if (dtype := self.source.columns[label.column]) not in label.types:
            raise ValueError(
                f"features.label.column: wanted type {' or '.join(label.types)} for a {label.kind} label, seen "
                f"{label.column!r}, {dtype}"
            )

    @model_validator(mode="after")
    def _time_split(self) -> "Config":
        if by := self.split.by_time:
            known_name("split.time.column: a column of the schema", by.column, list(self.source.columns))
            dtype = self.source.columns[by.column]
            if dtype not in ("date", "timestamp"):
                raise ValueError(f"split.time.column: wanted a date or a timestamp, seen {by.column!r}, {dtype}")
            inside = [moment for moment in by.boundaries.values() if utc(moment).time() != time()]
            if dtype == "date" and inside:
                raise ValueError(f"split.time.boundaries: wanted days for the date {by.column!r}, seen {inside[0]}")
        return self

    @staticmethod
    def _check_type(name: str, column: str, dtype: str, group: Input) -> None:
        step_names = [step.name for step in group.steps]
        wanted: tuple[str, ...] = (*NUMERIC, "boolean")
        if group.list_form:
            wanted = ("string",) if "tokens" in step_names else LIST_TYPES
        elif group.reads_values:
            wanted = ("int", "bigint", "boolean", "string", "date")
        elif step_names == ["missing_indicator"]:
            wanted = (*NUMERIC, "boolean", "string", "date", "timestamp", "binary")
        elif group.origin and group.origin.name in DATES:
            wanted = ("date", "timestamp")
        elif group.kind == "image":
            wanted = ("binary",)
        elif group.kind == "sparse":
            wanted = ("sparse(N)",)
        elif "vector" in step_names:
            wanted = tuple(f"array<{numeric}>" for numeric in NUMERIC)
        if re.sub(r"\(\d+\)", "(N)", dtype) not in wanted:
            raise ValueError(
                f"features.inputs.{name}: column {column!r}: wanted type {' or '.join(wanted)} for steps {step_names}, "
                f"seen {dtype}"
            )

    @model_validator(mode="after")
    def _targets(self) -> "Config":
        kind = self.features.label_kind
        for name, group in self.features.inputs.items():
            if kind not in ("binary", "real", "count") and any(step.name == "target" for step in group.steps):
                raise ValueError(
                    f"features.inputs.{name}.steps: 'target' takes a binary, real or count label, seen {kind}; use frequency"
                )
        return self

    @model_validator(mode="after")
    def _recommending(self) -> "Config":
        tower = self.model is not None and self.model.network == "two_tower"
        if self.recommend is None:
            names = [estimator.estimator for estimator in self.classic]
            if found := [*(["model: two_tower"] if tower else []), *(["classic: ALS"] if "ALS" in names else [])]:
                raise ValueError(f"recommend: wanted, because {found[0]} learns from users and items; seen none")
            return self
        self.recommend.check(self.features, self.split.by_last)
        if self.gate.metric == "coverage":
            raise ValueError(
                "gate.metric: wanted ndcg, recall or rmse, seen coverage, which says nothing of being right"
            )
        stopping = self.train.early_stopping
        if tower and stopping and stopping.metric != "loss":
            raise ValueError(
                f"train.early_stopping.metric: wanted loss, all that two_tower has, seen {stopping.metric}"
            )
        return self

    @model_validator(mode="after")
    def _models(self) -> "Config":
        kind = self.features.label_kind
        names = [estimator.estimator for estimator in self.classic]
        if kind == "none" and self.model:
            raise ValueError("model: a network learns a label: wanted features.label, seen none")
        if kind == "survival" and self.model:
            raise ValueError("model: no network learns a survival label; use AFTSurvivalRegression of 'classic'")
        if self.model and self.model.network in catalog.NETWORKS:
            learns = [name for name in catalog.NETWORKS if (name in catalog.DECODERS) == (kind == "next_token")]
            known_name(f"model.network: a network that learns {_of_kind(kind)}", self.model.network, learns)
        if names and not catalog.ESTIMATORS_OF[kind]:
            raise ValueError(
                f"classic: MLlib has no estimator of a {kind} label; use a 'model'"
                f"{', or a workload for each class' if kind == 'multilabel' else ''}"
            )
        for name in names:
            if name not in catalog.ESTIMATORS_OF[kind]:
                if kind == "none":
                    raise ValueError(
                        f"classic: {name} learns a label: wanted features.label, seen none; without one: "
                        f"{', '.join(sorted(catalog.CLUSTERERS))}"
                    )
                if name in catalog.CLUSTERERS:
                    raise ValueError(
                        f"classic: {name} takes no label: wanted no features.label, seen one of kind {kind}"
                    )
                raise ValueError(f"classic: {name} does not fit a {kind} label")
            if names.count(name) > 1:
                raise ValueError(f"classic: wanted each estimator once, seen {name} {names.count(name)} times")
        for metric in (self.gate_metric, *self.gate.require):
            known_name(f"gate: a metric of {_of_kind(kind)}", metric, self.metrics)
        self._check_inputs()
        if not self.candidates and not self.mine:
            raise ValueError("wanted a 'model', a 'classic' or a 'mine' section, seen none of them")
        if self.mine:
            kinds = {name: group.kind for name, group in self.features.inputs.items()}
            check_mine(self.mine, self.source.ingested, kinds)
        return self

    def _check_inputs(self) -> None:
        """Refuse inputs of an estimator that are not there, or not for MLlib."""
        inputs = self.features.inputs
        for place, estimator in enumerate(self.classic):
            for name in estimator.inputs or inputs:
                known_name(f"classic.{place}.inputs: one of features.inputs", name, list(inputs))
                if inputs[name].kind == "sequence":
                    raise ValueError(
                        f"features.inputs.{name}.steps: a 'sequence' is for networks; {estimator.estimator} reads a 'bag', "
                        "or other inputs (classic: inputs)"
                    )

    @model_validator(mode="after")
    def _stopping(self) -> "Config":
        for name in (estimator.estimator for estimator in self.classic if estimator.stops_early):
            if "validation" not in self.split.names:
                raise ValueError(f"split.validation: wanted, because validationTol of {name} watches it; seen none")
            if self.features.label_kind == "multiclass":
                raise ValueError(
                    f"classic: {name}: validationTol: wanted a binary, real or count label, seen multiclass"
                )
        stopping, kind = self.train.early_stopping, self.features.label_kind
        if stopping and stopping.metric != "loss":
            unseen = ("ks", "log_loss")  # the loss of classes is their log loss, or goes with it
            known = [metric for metric in METRICS_OF[kind] if metric not in unseen]
            known_name(f"train.early_stopping.metric: a metric of a {kind} label", stopping.metric, ["loss", *known])
        return self

    @model_validator(mode="after")
    def _weights(self) -> "Config":
        if self.class_weights is None:
            return self
        kind = self.features.label_kind
        if kind not in ("binary", "multiclass"):
            raise ValueError(f"class_weights: wanted a binary or multiclass label, seen kind {kind!r}")
        for name in (estimator.estimator for estimator in self.classic if estimator.estimator in catalog.UNWEIGHTED):
            raise ValueError(f"class_weights: {name} takes no weights; leave it out, or them")
        if kind == "binary" and self.class_weights != "balanced":
            for value in self.class_weights:
                known_name("class_weights: a class of a binary label", str(value), ["0", "1"])
        return self

    @model_validator(mode="after")
    def _tuning(self) -> "Config":
        if self.tune is None:
            return self
        check_spaces(self.tune, self.classic, self.model, self.train)
        if self.tune.folds is None and "validation" not in self.split.names:
            raise ValueError("split.validation: wanted, because tune measures on it; seen none; or set tune.folds")
        kind = self.features.label_kind
        ranks = {estimator.estimator for estimator in self.classic if estimator.gives == "affinity"}
        if self.model and self.model.network == "two_tower":
            ranks |= {"model", "train"}
        if found := ranks & set(self.tune.spaces):
            who = "ALS with implicitPrefs" if "ALS" in found else "two_tower"
            raise ValueError(f"tune: {who} gives no rating, and so none of the metrics that trials are compared by")
        known_name(f"tune.metric: a metric of {_of_kind(kind)}", self.tune_metric, METRICS_OF[kind])
        return self

    def tuned(self, best: Mapping[str, Mapping[str, Any]]) -> "Config":
        """This config with other values, by section: an estimator's name, `model`, `train`.

        Raises:
            ValidationError: A section refuses one.
        """
        model = self.model and with_values(self.model, best.get("model", {}))
        classic = [with_values(estimator, best.get(estimator.estimator, {})) for estimator in self.classic]
        train = with_values(self.train, best.get("train", {}))
        return self.model_copy(update={"classic": classic, "model": model, "train": train})

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those that some candidate may have."""
        return (*METRICS_OF[self.features.label_kind], *(RANKED if self.recommend else ()))

    @property
    def tune_metric(self) -> str:
        """The metric that tuning makes better."""
        metric = (self.tune and self.tune.metric) or self.gate_metric
        return "rmse" if metric in RANKED else metric  # trials rank nothing

    @property
    def candidates(self) -> int:
        """How many models are compared."""
        return len(self.classic) + (self.model is not None)

    @property
    def gate_metric(self) -> Metric:
        """The metric that picks the candidate."""
        default: Metric = "ndcg" if self.recommend else METRICS_OF[self.features.label_kind][0]
        return self.gate.metric or default


def _of_kind(kind: str) -> str:
    return "clusters" if kind == "none" else f"a {kind} label"
