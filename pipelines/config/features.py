"""The section of the fitted transform: inputs, their steps, the label, the layout."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.config.base import Name, Section
from pipelines.config.data import NUMERIC, RESERVED_COLUMNS
from pipelines.config.steps import Hash, Step

IMPUTERS = ("impute_mean", "impute_median", "impute_most_frequent", "impute_constant")
SHAPERS = ("log1p", "signed_log", "clip")
SCALERS = ("standardize", "robust_scale", "min_max")
INDEXERS = ("vocabulary", "hash")
ENCODERS = ("frequency", "target")
DATES = ("date", "age")
ORIGINS = (*DATES, "ratio")  # what makes numbers of columns, in front of all other steps
WHOLE = ("image", "vector", "sparse")  # steps that take one column as it is
LISTS = ("bag", "sequence")  # what a list becomes
SVD_NUMBERS = 1 << 20  # of singular vectors, which the fitted transform's JSON holds

LabelKind = Literal["binary", "multiclass", "multilabel", "real", "count", "survival", "next_token"]
NUMBERS = ("real", "count", "survival")  # kinds of label that are a number, and predicted as one
LIST_TYPES = ("array<string>", "array<int>", "array<bigint>")  # columns of lists of values
_CLASS_TYPES = (*NUMERIC, "string", "boolean", "date", "timestamp")


class Input(Section):
    """One input of the models, one column of the feature table: columns of the source and their steps."""

    columns: list[Name] = Field(min_length=1, description="Columns of the source that take the same steps.")
    steps: list[Step] = Field(default=[], description="What is done to each column, in order.")

    @model_validator(mode="after")
    def _order(self) -> "Input":
        names = [step.name for step in self.steps]
        for alone in ("image", "sparse", "missing_indicator"):
            if alone in names and len(names) > 1:
                raise ValueError(f"steps: {alone!r} stands alone, seen {names}")
        if self.whole and len(self.columns) > 1:
            raise ValueError(f"steps: {names[0]!r} takes one column, seen {len(self.columns)}")
        if "vector" in names or "pca" in names:
            return self._vector(names)
        if set(names) & {"tokens", "svd", *LISTS}:
            return self._list(names)
        if "cross" in names and len(self.columns) < 2:
            raise ValueError(f"steps: 'cross' takes several columns, seen {self.columns}")
        categories = [name for name in names if name in ("cross", *INDEXERS, *ENCODERS)]
        if categories:
            if len(names) != len(categories) or categories == ["cross"]:
                raise ValueError(
                    f"steps: wanted one of {', '.join((*INDEXERS, *ENCODERS))}, with no step but 'cross' before it, seen "
                    f"{names}"
                )
            if [name == "cross" for name in categories] not in ([False], [True, False]):
                raise ValueError(f"steps: wanted one step that reads values, behind 'cross' or alone, seen {names}")
            return self
        names = self._behind_origin(names)
        for group in (IMPUTERS, SCALERS, ("bucketize",)):
            seen = [name for name in names if name in group]
            if len(seen) > 1:
                raise ValueError(f"steps: wanted one of {', '.join(group)}, seen {seen}")
        if any(name in IMPUTERS for name in names[1:]):
            raise ValueError(f"steps: an imputer comes first, seen {names}")
        if "bucketize" in names and not set(names) <= {*IMPUTERS, "bucketize"}:
            raise ValueError(f"steps: 'bucketize' takes values in the column's own units, seen {names}")
        return self

    def _vector(self, names: list[str]) -> "Input":
        if names not in [
            ["vector", *scaler, *pca] for scaler in ([], ["standardize"], ["min_max"]) for pca in ([], ["pca"])
        ]:
            raise ValueError(f"steps: wanted 'vector', then 'standardize' or 'min_max', then 'pca', seen {names}")
        for step in self.steps[1:]:
            if step.pca and step.pca.components > self.steps[0].options.width:
                raise ValueError(f"steps: pca: wanted at most {self.steps[0].options.width} components")
        return self

    def _list(self, names: list[str]) -> "Input":
        ends = [*([form] for form in LISTS), ["bag", "svd"]]
        if names[names[0] == "tokens" :] not in [[indexer, *end] for indexer in INDEXERS for end in ends]:
            raise ValueError(
                f"steps: wanted 'tokens' where it is text, then one of {', '.join(INDEXERS)}, then one of "
                f"{', '.join(LISTS)}, and 'svd' only behind a 'bag', seen {names}"
            )
        ids = self.reads_values.options if self.reads_values else None
        size = ids.buckets if isinstance(ids, Hash) else getattr(ids, "max_size", None)
        form, last = self.list_form, self.steps[-1]
        if form and form.bag and not form.bag.other and isinstance(ids, Hash):
            raise ValueError("steps: bag: other: wanted it with a vocabulary; a 'hash' knows no other values")
        if last.svd and (size is None or size * last.svd.components > SVD_NUMBERS):
            raise ValueError(
                f"steps: svd: wanted max_size or buckets, times components at most {SVD_NUMBERS:,} numbers, seen {size} "
                f"times {last.svd.components}"
            )
        if last.svd and size and last.svd.components > size:
            raise ValueError(f"steps: svd: wanted at most {size} components, seen {last.svd.components}")
        return self

    def _behind_origin(self, names: list[str]) -> list[str]:
        """The steps of the numbers that columns become, or all steps."""
        if not set(names) & set(ORIGINS):
            return names
        if names[0] not in ORIGINS or set(names[1:]) & set(ORIGINS):
            raise ValueError(f"steps: one of {', '.join(ORIGINS)} comes first, seen {names}")
        if self.origin and self.origin.date and self.origin.date.cyclic and len(names) > 1:
            raise ValueError(f"steps: a cyclic 'date' stands alone, seen {names}")
        return names[1:]

    @property
    def origin(self) -> Step | None:
        """The step that makes numbers of dates, or of two columns, where there is one."""
        return self.steps[0] if self.steps and self.steps[0].name in ORIGINS else None

    @property
    def whole(self) -> Step | None:
        """The step that takes its one column as it is, where there is one."""
        return next((step for step in self.steps if step.name in (*WHOLE, *LISTS)), None)

    @property
    def list_form(self) -> Step | None:
        """What a list becomes, where the column holds lists or tokens."""
        return next((step for step in self.steps if step.name in LISTS), None)

    @property
    def reads_values(self) -> Step | None:
        """The step that takes values as categories, where there is one."""
        return next((step for step in self.steps if step.name in (*INDEXERS, *ENCODERS)), None)

    @property
    def weights(self) -> list[str]:
        """The column with the weights of a list, where there is one."""
        form = self.list_form
        return [form.bag.weights] if form and form.bag and form.bag.weights else []

    @property
    def has_idf(self) -> bool:
        """Whether a list's ids are weighted by the rows that have them."""
        form = self.list_form
        return bool(form and form.bag and form.bag.weighting == "tf_idf")

    @property
    def sources(self) -> list[tuple[str, ...]]:
        """The columns behind each place: one, or all of a cross."""
        if any(step.name == "cross" for step in self.steps):
            return [tuple(self.columns)]
        return [(column,) for column in self.columns]

    @property
    def kind(self) -> Literal["dense", "ids", "image", "sparse", "sequence"]:
        """What it becomes: `dense`, `ids`, `image`, `sparse` or `sequence`."""
        names = {step.name for step in self.steps}
        if "sequence" in names:
            return "sequence"
        if "svd" in names:
            return "dense"
        if names & {"sparse", "bag"}:
            return "sparse"
        if names & {*INDEXERS, "bucketize"}:
            return "ids"
        return "image" if "image" in names else "dense"


class Label(Section):
    """What is predicted."""

    column: Name = Field(description="The column of the source.")
    kind: LabelKind = Field(
        description="Two classes, one of several classes, any of several classes (a list of those that the row has), a "
        "number, a count (a whole number of at least 0, whose rate is learned), survival: a time until an event, or until "
        "nobody looked any more, or next_token: what comes next in the one sequence that is made of the column."
    )
    event: Name | None = Field(
        default=None,
        description="survival: the column that is 1 where the event was seen, 0 where it is not known when.",
    )
    positive: list[str | int | float] = Field(default=[], description="binary: the values that count as 1.")
    negative: list[str | int | float] = Field(
        default=[], description="binary: the values that count as 0. Empty: every other value."
    )
    classes: list[str | int | float] = Field(
        default=[], description="multiclass, multilabel: the classes in order. Empty: those of the table, sorted."
    )

    @model_validator(mode="after")
    def _values(self) -> "Label":
        if self.kind == "binary" and not self.positive:
            raise ValueError("wanted 'positive', the values that count as 1, for a binary label")
        if self.kind != "binary" and (self.positive or self.negative):
            raise ValueError(f"'positive' and 'negative' belong to a binary label, seen kind {self.kind!r}")
        if self.kind not in ("multiclass", "multilabel") and self.classes:
            raise ValueError(f"'classes' belongs to a multiclass or multilabel label, seen kind {self.kind!r}")
        if (self.kind == "survival") != (self.event is not None):
            raise ValueError(
                f"'event', the column that is 1 where the event was seen, belongs to a survival label and to no other, seen "
                f"{self.event!r} with kind {self.kind!r}"
            )
        if self.event == self.column:
            raise ValueError(f"event: wanted another column than the time, seen {self.event!r} twice")
        return self

    @property
    def columns(self) -> list[str]:
        """The columns of the source that it reads."""
        return [self.column, *([self.event] if self.event else [])]

    @property
    def types(self) -> tuple[str, ...]:
        """The types that the column may have."""
        if self.kind == "multilabel":
            return LIST_TYPES
        if self.kind == "next_token":
            return ("string", *LIST_TYPES)
        return NUMERIC if self.kind in NUMBERS else _CLASS_TYPES


class Layout(Section):
    """How the feature tables lie on disk."""

    shard_mb: Annotated[float, Field(gt=0)] = Field(
        default=16.0, description="Size of a file, which is one row group, in MB of raw column data."
    )
    compression: Literal["lz4_raw", "snappy", "zstd", "uncompressed"] = Field(
        default="lz4_raw",
        description="Codec of the files. lz4_raw is read fastest; Spark before 3.5 reads only the others, zstd is smallest.",
    )


class Features(Section):
    """The fitted transform and the tables that it writes, one a split."""

    label: Label | None = Field(
        default=None, description="What is predicted. Left out, clusterers find groups of rows that are alike."
    )
    inputs: dict[Name, Input] = Field(min_length=1, description="The inputs of the models, by name.")
    refit: bool = Field(
        default=True,
        description="Fit the transform anew when the table grew. False keeps it as fitted, and reads and writes only the "
        "rows that came, as long as nothing else changed.",
    )
    layout: Layout = Field(default=Layout(), description="How the tables lie on disk.")

    @field_validator("inputs")
    @classmethod
    def _names(cls, inputs: dict[str, Input]) -> dict[str, Input]:
        for name in inputs:
            if name in RESERVED_COLUMNS:
                raise ValueError(f"input {name!r}: this name is Headrace's own; give the input another one")
        return inputs

    @model_validator(mode="after")
    def _next_token(self) -> "Features":
        if self.label_kind == "next_token":
            assert self.label is not None
            seen = {name: (*group.columns, *(step.name for step in group.steps)) for name, group in self.inputs.items()}
            if [shape[:1] + shape[-2:] for shape in seen.values()] != [(self.label.column, "vocabulary", "sequence")]:
                raise ValueError(
                    f"inputs: wanted one for a next_token label, of column {self.label.column!r} with the steps 'vocabulary' "
                    f"and 'sequence', seen {seen}"
                )
        return self

    @property
    def label_kind(self) -> str:
        """The label's kind, `none` where there is none."""
        return self.label.kind if self.label else "none"

    @property
    def sources(self) -> list[str]:
        """The columns of the source that the inputs read, each once."""
        found = [column for group in self.inputs.values() for column in (*group.columns, *group.weights)]
        others = [step.other for group in self.inputs.values() for step in group.steps if step.other]
        return list(dict.fromkeys([*found, *others]))
