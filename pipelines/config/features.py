"""The section of the fitted transform: inputs, their steps, the label, the layout."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.config.base import Name, Positive, Section
from pipelines.config.data import RESERVED_COLUMNS


class NoOptions(Section):
    """A step without options."""


class ImputeConstant(Section):
    """Missing values become `value`."""

    value: float = Field(description="What stands for a missing value.")


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
    impute_constant: ImputeConstant | None = Field(default=None, description="Missing values become a constant.")
    log1p: NoOptions | None = Field(default=None, description="log(1 + x); values below 0 count as 0.")
    standardize: NoOptions | None = Field(default=None, description="To mean 0 and standard deviation 1.")
    min_max: NoOptions | None = Field(default=None, description="To [0, 1] by the training minimum and maximum.")
    bucketize: Bucketize | None = Field(default=None, description="To bucket ids.")
    vocabulary: Vocabulary | None = Field(default=None, description="To ids by a vocabulary.")
    hash: Hash | None = Field(default=None, description="To ids by a hash.")
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


IMPUTERS = ("impute_mean", "impute_median", "impute_constant")
SCALERS = ("standardize", "min_max")
INDEXERS = ("bucketize", "vocabulary", "hash")
WHOLE = ("image", "vector", "sparse")  # steps that take one column as it is and stand alone


class Input(Section):
    """One input of the models, one column of the feature table: columns of the source and their steps."""

    columns: list[Name] = Field(min_length=1, description="Columns of the source that take the same steps.")
    steps: list[Step] = Field(default=[], description="What is done to each column, in order.")

    @model_validator(mode="after")
    def _order(self) -> "Input":
        names = [step.name for step in self.steps]
        order = [*IMPUTERS, "log1p", *SCALERS, *INDEXERS]
        whole = [name for name in names if name in WHOLE]
        if whole:
            if len(names) > 1 or len(self.columns) > 1:
                raise ValueError(f"steps: {whole[0]!r} takes one column and stands alone, seen {names}")
            return self
        stages = [[n for n in names if n in group] for group in (IMPUTERS, SCALERS, INDEXERS)]
        for group in stages:
            if len(group) > 1:
                raise ValueError(f"steps: wanted one of {group}, seen both")
        if names != sorted(names, key=order.index):
            raise ValueError(
                f"steps: wanted the order impute, log1p, standardize or min_max, or an indexer; seen {names}"
            )
        if stages[2] and (stages[1] or (stages[2] != ["bucketize"] and len(names) > 1)):
            raise ValueError(f"steps: {stages[2][0]!r} makes ids and takes raw values, seen {names}")
        return self

    @property
    def kind(self) -> str:
        """What it becomes: `dense`, `ids`, `image` or `sparse`."""
        names = {step.name for step in self.steps}
        if names & set(INDEXERS):
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
