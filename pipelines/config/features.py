"""The section of the fitted transform: inputs, their steps, the label, the layout."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.config.base import Name, Positive, Section, Share
from pipelines.config.data import RESERVED_COLUMNS

PartName = Literal["year", "quarter", "month", "week", "day", "day_of_week", "day_of_year", "hour", "minute"]


class NoOptions(Section):
    """A step without options."""


class ImputeConstant(Section):
    """Missing values become `value`."""

    value: float = Field(description="What stands for a missing value.")


class Clip(Section):
    """A number beyond a bound becomes the bound."""

    low: float | None = Field(default=None, description="The lower bound.")
    high: float | None = Field(default=None, description="The upper bound.")
    quantiles: tuple[Share, Share] | None = Field(
        default=None, description="Bounds by quantiles of the training split, as [0.01, 0.99], instead."
    )

    @model_validator(mode="after")
    def _one_way(self) -> "Clip":
        fixed = [bound for bound in (self.low, self.high) if bound is not None]
        if bool(fixed) == (self.quantiles is not None):
            raise ValueError("wanted 'low' or 'high', or else 'quantiles'")
        for bounds in (fixed, self.quantiles or ()):
            if len(bounds) == 2 and not bounds[0] < bounds[1]:
                raise ValueError(f"wanted a lower bound below the upper one, seen {list(bounds)}")
        return self


class Bucketize(Section):
    """A number becomes the index of its bucket; missing is a bucket of its own, the last."""

    splits: list[float] | None = Field(default=None, description="Rising inner boundaries of the buckets.")
    quantiles: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="The number of buckets of equal count, from the training split."
    )

    @model_validator(mode="after")
    def _one_way(self) -> "Bucketize":
        if (self.splits is None) == (self.quantiles is None):
            raise ValueError("wanted one of 'splits' and 'quantiles'")
        if self.splits is not None and (not self.splits or sorted(set(self.splits)) != self.splits):
            raise ValueError(f"splits: wanted rising numbers, seen {self.splits}")
        return self


class Vocabulary(Section):
    """A value becomes its rank by count in the training split, from 1; id 0 is out of vocabulary."""

    min_count: Positive = Field(default=1, description="Rarer values are out of vocabulary.")
    max_size: Positive | None = Field(default=None, description="Keep only this many of the most frequent values.")


class Hash(Section):
    """A value becomes a hash bucket (xxhash64), with no pass over the data."""

    buckets: Annotated[int, Field(ge=2)] = Field(description="The number of buckets.")


class Frequency(Section):
    """A value becomes its share of the training rows; 0 where it was not seen there."""

    min_count: Positive = Field(default=1, description="Rarer values count as not seen.")


class Target(Section):
    """A value becomes the label's mean over the training rows that have it, drawn toward the mean of all rows.

    For a training row the mean is taken over the other folds, so that its own label does not leak into its features
    (D. Micci-Barreca, 2001; out of fold as in scikit-learn's TargetEncoder).
    """

    smoothing: Annotated[float, Field(ge=0.0)] = Field(
        default=20.0, description="Rows at the mean of all that are added to each value."
    )
    folds: Annotated[int, Field(ge=2, le=20)] = Field(
        default=5, description="Parts of the training split, by a hash of `row_id`."
    )
    min_count: Positive = Field(default=1, description="Rarer values take the mean of all rows.")


class Date(Section):
    """A date or timestamp (in UTC) becomes numbers, one a part; the steps behind are those of numbers."""

    parts: list[PartName] = Field(
        min_length=1,
        description="Parts, in order: year, quarter, month, week (ISO), day, day_of_week (Monday is 1), day_of_year, "
        "hour, minute.",
    )
    cyclic: bool = Field(
        default=False,
        description="Each part but the year as two numbers, the sine and cosine of its place in its cycle, so that "
        "December is beside January; both are 0 where the date is missing.",
    )

    @model_validator(mode="after")
    def _cycles(self) -> "Date":
        if self.cyclic and "year" in self.parts:
            raise ValueError("parts: 'year' has no cycle; give it an input of its own")
        return self


class Age(Section):
    """A date or timestamp becomes the days by which it is later than that of another column."""

    against: Name = Field(description="The other column.")


class Image(Section):
    """Bytes of one uint8 image a row, stored as fixed-length binary and scaled in torch."""

    shape: list[Positive] = Field(description="Height and width, or height, width and channels.")
    scale: tuple[float, float] = Field(default=(0.0, 1.0), description="What pixels 0 and 255 become.")

    @field_validator("shape")
    @classmethod
    def _dims(cls, shape: list[int]) -> list[int]:
        if len(shape) not in (2, 3):
            raise ValueError(f"wanted [height, width] or [height, width, channels], seen {shape}")
        return shape


class Vector(Section):
    """Lists of numbers of one width."""

    width: Positive = Field(description="The length of every list.")


class Step(Section):
    """One transform of an input; exactly one key is set. A bare name stands for a step without options."""

    impute_mean: NoOptions | None = Field(default=None, description="Missing values become the mean.")
    impute_median: NoOptions | None = Field(default=None, description="Missing values become the median.")
    impute_most_frequent: NoOptions | None = Field(
        default=None, description="Missing values become the most frequent value, the lowest of several."
    )
    impute_constant: ImputeConstant | None = Field(default=None, description="Missing values become a constant.")
    log1p: NoOptions | None = Field(default=None, description="log(1 + x); values below 0 count as 0.")
    signed_log: NoOptions | None = Field(default=None, description="sign(x) log(1 + |x|).")
    clip: Clip | None = Field(default=None, description="Between two bounds.")
    standardize: NoOptions | None = Field(default=None, description="To mean 0 and standard deviation 1.")
    robust_scale: NoOptions | None = Field(
        default=None, description="To median 0 and a distance of 1 between the quartiles, both of the values present."
    )
    min_max: NoOptions | None = Field(default=None, description="To [0, 1] by the training minimum and maximum.")
    bucketize: Bucketize | None = Field(default=None, description="To bucket ids.")
    missing_indicator: NoOptions | None = Field(default=None, description="To 1 where the value is missing, else 0.")
    cross: NoOptions | None = Field(
        default=None, description="All columns of the input become one value, their combination, for the step behind."
    )
    vocabulary: Vocabulary | None = Field(default=None, description="To ids by a vocabulary.")
    hash: Hash | None = Field(default=None, description="To ids by a hash.")
    frequency: Frequency | None = Field(default=None, description="To the value's share of the training rows.")
    target: Target | None = Field(default=None, description="To the label's mean, out of fold in training.")
    date: Date | None = Field(default=None, description="Dates to numbers, by their parts.")
    age: Age | None = Field(default=None, description="Dates to the days since another date.")
    image: Image | None = Field(default=None, description="Images as fixed-length bytes.")
    vector: Vector | None = Field(default=None, description="Vectors of fixed width.")
    sparse: NoOptions | None = Field(default=None, description="Sparse vectors as padded (ids, weights).")

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {value: {}} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_key(self) -> "Step":
        if len(self.model_fields_set) != 1:
            raise ValueError(f"wanted one step, seen {sorted(self.model_fields_set) or 'none'}")
        return self

    @property
    def name(self) -> str:
        """The name of the one step that is set."""
        return next(iter(self.model_fields_set))

    @property
    def options(self) -> Any:
        """Its options."""
        return getattr(self, self.name)


IMPUTERS = ("impute_mean", "impute_median", "impute_most_frequent", "impute_constant")
SHAPERS = ("log1p", "signed_log", "clip")
SCALERS = ("standardize", "robust_scale", "min_max")
INDEXERS = ("vocabulary", "hash")
ENCODERS = ("frequency", "target")
DATES = ("date", "age")
WHOLE = ("image", "vector", "sparse")  # steps that take one column as it is and stand alone


class Input(Section):
    """One input of the models, one column of the feature table: columns of the source and their steps."""

    columns: list[Name] = Field(min_length=1, description="Columns of the source that take the same steps.")
    steps: list[Step] = Field(default=[], description="What is done to each column, in order.")

    @model_validator(mode="after")
    def _order(self) -> "Input":
        names = [step.name for step in self.steps]
        for alone in (*WHOLE, "missing_indicator"):
            if alone in names and len(names) > 1:
                raise ValueError(f"steps: {alone!r} stands alone, seen {names}")
        if self.whole and len(self.columns) > 1:
            raise ValueError(f"steps: {names[0]!r} takes one column, seen {len(self.columns)}")
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
        names = self._behind_dates(names)
        for group in (IMPUTERS, SCALERS, ("bucketize",)):
            seen = [name for name in names if name in group]
            if len(seen) > 1:
                raise ValueError(f"steps: wanted one of {', '.join(group)}, seen {seen}")
        if any(name in IMPUTERS for name in names[1:]):
            raise ValueError(f"steps: an imputer comes first, seen {names}")
        if "bucketize" in names and not set(names) <= {*IMPUTERS, "bucketize"}:
            raise ValueError(f"steps: 'bucketize' takes values in the column's own units, seen {names}")
        return self

    def _behind_dates(self, names: list[str]) -> list[str]:
        """The steps of the numbers that dates become, or all steps."""
        if not set(names) & set(DATES):
            return names
        if names[0] not in DATES or set(names[1:]) & set(DATES):
            raise ValueError(f"steps: one of {' and '.join(DATES)} comes first, seen {names}")
        if self.dates and self.dates.date and self.dates.date.cyclic and len(names) > 1:
            raise ValueError(f"steps: a cyclic 'date' stands alone, seen {names}")
        return names[1:]

    @property
    def dates(self) -> Step | None:
        """The step that makes numbers of dates, where there is one."""
        return self.steps[0] if self.steps and self.steps[0].name in DATES else None

    @property
    def whole(self) -> Step | None:
        """The step that takes its one column as it is, where there is one."""
        return next((step for step in self.steps if step.name in WHOLE), None)

    @property
    def reads_values(self) -> Step | None:
        """The step that takes values as categories, where there is one."""
        return next((step for step in self.steps if step.name in (*INDEXERS, *ENCODERS)), None)

    @property
    def sources(self) -> list[tuple[str, ...]]:
        """The columns behind each place: one, or all of a cross."""
        if any(step.name == "cross" for step in self.steps):
            return [tuple(self.columns)]
        return [(column,) for column in self.columns]

    @property
    def kind(self) -> str:
        """What it becomes: `dense`, `ids`, `image` or `sparse`."""
        names = {step.name for step in self.steps}
        if names & {*INDEXERS, "bucketize"}:
            return "ids"
        return next(iter(names & {"image", "sparse"}), "dense")


class Label(Section):
    """What is predicted."""

    column: Name = Field(description="The column of the source.")
    kind: Literal["binary", "multiclass", "real"] = Field(description="Two classes, several classes, or a number.")
    positive: list[str | int | float] = Field(default=[], description="binary: the values that count as 1.")
    negative: list[str | int | float] = Field(
        default=[], description="binary: the values that count as 0. Empty: every other value."
    )
    classes: list[str | int | float] = Field(
        default=[], description="multiclass: the classes in order. Empty: those of the training split, sorted."
    )

    @model_validator(mode="after")
    def _values(self) -> "Label":
        if self.kind == "binary" and not self.positive:
            raise ValueError("wanted 'positive', the values that count as 1, for a binary label")
        if self.kind != "binary" and (self.positive or self.negative):
            raise ValueError(f"'positive' and 'negative' belong to a binary label, seen kind {self.kind!r}")
        if self.kind != "multiclass" and self.classes:
            raise ValueError(f"'classes' belongs to a multiclass label, seen kind {self.kind!r}")
        return self


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

    label: Label = Field(description="What is predicted.")
    inputs: dict[Name, Input] = Field(min_length=1, description="The inputs of the models, by name.")
    layout: Layout = Field(default=Layout(), description="How the tables lie on disk.")

    @field_validator("inputs")
    @classmethod
    def _names(cls, inputs: dict[str, Input]) -> dict[str, Input]:
        for name in inputs:
            if name in RESERVED_COLUMNS:
                raise ValueError(f"input {name!r}: this name is Headrace's own; give the input another one")
        return inputs
