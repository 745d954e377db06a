"""The steps of the fitted transform, each with its options."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.config.base import Name, Positive, Section, Share

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
    max_share: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1.0,
        description="Values in a larger share of the training rows are out of vocabulary, as words are that stand in most "
        "texts and tell nothing.",
    )


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


class Ratio(Section):
    """A number becomes its quotient by another column, missing where either is, or where that is 0."""

    by: Name = Field(description="The other column.")


class Image(Section):
    """One uint8 image a row, stored as fixed-length binary and scaled in torch."""

    shape: list[Positive] = Field(description="Height and width, or height, width and channels.")
    scale: tuple[float, float] = Field(default=(0.0, 1.0), description="What pixels 0 and 255 become.")
    encoded: bool = Field(
        default=False,
        description="The bytes are a PNG or JPEG file: decoded, made gray or RGB by the channels, and resized to the "
        "shape. Otherwise they are the pixels.",
    )

    @field_validator("shape")
    @classmethod
    def _dims(cls, shape: list[int]) -> list[int]:
        if len(shape) not in (2, 3):
            raise ValueError(f"wanted [height, width] or [height, width, channels], seen {shape}")
        return shape

    @model_validator(mode="after")
    def _channels(self) -> "Image":
        if self.encoded and len(self.shape) == 3 and self.shape[2] != 3:
            raise ValueError(f"shape: wanted 3 channels, or none for gray, for encoded images, seen {self.shape}")
        return self


class Vector(Section):
    """Lists of numbers of one width; `standardize` or `min_max`, then `pca`, may follow."""

    width: Positive = Field(description="The length of every list.")


class Pca(Section):
    """A vector becomes its principal components."""

    components: Positive = Field(description="How many, of the largest variance in the training split.")


class Svd(Section):
    """A bag becomes a vector of few places: its weights along the first right singular vectors of the training rows.

    Behind `tf_idf` this is latent semantic analysis (S. Deerwester et al., 1990). Nothing is centred, so that sparse rows
    stay sparse, as in scikit-learn's TruncatedSVD.
    """

    components: Positive = Field(description="How many, of the largest singular values in the training split.")


class Tokens(Section):
    """A text becomes a list of tokens, for `vocabulary` or `hash` behind it."""

    split: str = Field(
        default=r"[^\pL\pN]+", description="What stands between tokens: a regular expression in RE2's syntax."
    )
    unit: Literal["words", "characters"] = Field(
        default="words", description="What a token is; of characters each is one, whatever `split` says."
    )
    lower: bool = Field(default=True, description="In lower case.")
    ngrams: Annotated[int, Field(ge=1, le=5)] = Field(
        default=1, description="Also the sequences of 2 to so many neighbours, words joined by a space."
    )

    @field_validator("split")
    @classmethod
    def _compiles(cls, split: str) -> str:
        import pyarrow as pa
        import pyarrow.compute as pc

        try:
            pc.split_pattern_regex(pa.array(["a"]), split)
        except pa.ArrowInvalid as error:
            raise ValueError(f"wanted a regular expression of RE2, seen {split!r}: {error}") from None
        if not split:
            raise ValueError("wanted a regular expression, seen none")
        return split


class Bag(Section):
    """A list becomes (ids, weights), an id once, padded by weights of 0; the order is lost."""

    length: Positive = Field(description="Distinct ids a row; the heaviest are kept, and of those the lowest.")
    weighting: Literal["count", "binary", "mean", "tf_idf"] | None = Field(
        default=None,
        description="The weight of an id: how often it is there (the default), 1, its share of the list, or the count "
        "times log((rows + 1) / (rows with it + 1)) over the training split, as in MLlib's IDF.",
    )
    weights: Name | None = Field(
        default=None, description="A column with a weight for each place of the list, which are added up instead."
    )
    other: bool = Field(default=True, description="Whether values out of vocabulary are in it, all together as id 0.")
    unit: bool = Field(
        default=False,
        description="Weights are divided by their Euclidean length, so that long lists weigh as short ones.",
    )

    @model_validator(mode="after")
    def _one_way(self) -> "Bag":
        if self.weights and self.weighting:
            raise ValueError("wanted one of 'weighting' and 'weights', seen both")
        return self


class Sequence(Section):
    """A list becomes ids in their order, cut or padded to one length; id 0 is padding, 1 out of vocabulary."""

    length: Positive = Field(description="Places of each row.")
    keep: Literal["first", "last"] = Field(default="first", description="Which end of a longer list is kept.")


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
    ratio: Ratio | None = Field(default=None, description="Numbers to their quotients by another column.")
    image: Image | None = Field(default=None, description="Images as fixed-length bytes.")
    vector: Vector | None = Field(default=None, description="Vectors of fixed width.")
    pca: Pca | None = Field(default=None, description="Vectors to principal components.")
    svd: Svd | None = Field(default=None, description="Bags to vectors by their singular vectors.")
    tokens: Tokens | None = Field(default=None, description="Text to lists of tokens.")
    bag: Bag | None = Field(default=None, description="Lists to padded (ids, weights).")
    sequence: Sequence | None = Field(default=None, description="Lists to ids of fixed length.")
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
    def other(self) -> str | None:
        """The column that it reads beside the input's own, where there is one."""
        return self.age.against if self.age else self.ratio.by if self.ratio else None

    @property
    def name(self) -> str:
        """The name of the one step that is set."""
        return next(iter(self.model_fields_set))

    @property
    def options(self) -> Any:
        """Its options."""
        return getattr(self, self.name)
