"""FittedFeatures: the fitted transform as JSON, for MLlib, torch and serving alike."""

import shutil
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from pipelines.config.steps import Bag, PartName, Sequence, Tokens
from pipelines.lake import Column, Contract, LabelSpec, Recommended
from pipelines.receipt import digest_of

MISSING = "\x00"  # stands for null where values are compared; no text file holds it
DAY_MICROS = 86_400_000_000.0
BETWEEN = "\x1f"  # between the values of a cross
BUNDLE_FILE, VALUES_FOLDER = "headrace.json", "values"

Floats = npt.NDArray[np.float64]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Fill(_Frozen):
    """A missing value becomes `value`."""

    step: Literal["fill"] = "fill"
    value: float


class Log1p(_Frozen):
    """log(1 + x), values below 0 as 0."""

    step: Literal["log1p"] = "log1p"


class SignedLog(_Frozen):
    """sign(x) log(1 + |x|)."""

    step: Literal["signed_log"] = "signed_log"


class Clip(_Frozen):
    """A value beyond a bound becomes the bound."""

    step: Literal["clip"] = "clip"
    low: float | None
    high: float | None


class Scale(_Frozen):
    """(x - shift) * factor, with a factor of at least 0."""

    step: Literal["scale"] = "scale"
    shift: float
    factor: float


NumberStep = Annotated[Fill | Log1p | SignedLog | Clip | Scale, Field(discriminator="step")]


class DatePart(_Frozen):
    """A part of a date or timestamp in UTC, or the sine or cosine of its place in its cycle."""

    reads: Literal["date_part"] = "date_part"
    part: PartName
    wave: Literal["sin", "cos"] | None = None

    @property
    def period(self) -> int:
        """Length of the part's cycle."""
        return CYCLES[self.part]


class DaysSince(_Frozen):
    """Days by which a date or timestamp is later than that of another column."""

    reads: Literal["days_since"] = "days_since"
    other: str


class Ratio(_Frozen):
    """The quotient by another column; missing where that is 0."""

    reads: Literal["ratio"] = "ratio"
    other: str


CYCLES = {
    "quarter": 4,
    "month": 12,
    "week": 53,
    "day": 31,
    "day_of_week": 7,
    "day_of_year": 366,
    "hour": 24,
    "minute": 60,
}


class FittedNumber(_Frozen):
    """How a number becomes a float, or the index of a bucket. Each step keeps the order of values.

    NaN counts as missing.

    Attributes:
        origin: What number is made of the column; None where it is taken as it is.
        steps: What is done, in order; a number that is no bucket has a Fill among them.
        splits: For ids, rising boundaries; bucket i holds [splits[i-1], splits[i]), missing is the last bucket.
    """

    kind: Literal["number"] = "number"
    column: str
    origin: Annotated[DatePart | DaysSince | Ratio, Field(discriminator="reads")] | None = None
    steps: tuple[NumberStep, ...] = ()
    splits: tuple[float, ...] | None = None

    @property
    def name(self) -> str:
        """Names its place in the input."""
        match self.origin:
            case DatePart(part=part, wave=wave):
                return f"{self.column} {part}" + (f" {wave}" if wave else "")
            case DaysSince(other=other):
                return f"{self.column} since {other}"
            case Ratio(other=other):
                return f"{self.column} per {other}"
            case None:
                return self.column

    @property
    def num_ids(self) -> int:
        """Ids when bucketized: one more than the splits, and one for missing."""
        return len(self.splits or ()) + 2


class FittedIndicator(_Frozen):
    """1.0 where the column is missing, else 0.0."""

    kind: Literal["indicator"] = "indicator"
    missing: str

    @property
    def name(self) -> str:
        """Names its place in the input."""
        return f"{self.missing} is missing"


class Stored(_Frozen):
    """Values that are too many for JSON: Parquet files with the columns `value` and `id`, for an encoding also `number`
    and `folds`; a missing value is `MISSING`.

    Attributes:
        folder: Of the files, a Delta table; in a bundle beside the JSON.
        files: Those of the table's version.
        size: Values.
        digest: Of their content.
    """

    folder: str
    files: tuple[str, ...]
    size: int
    digest: str

    def paths(self) -> list[str]:
        """The files."""
        return [str(Path(self.folder) / name) for name in self.files]


class FittedCategory(_Frozen):
    """How a value becomes an id: its place in `values` from 1, 0 where it is not there; or a hash bucket.

    Attributes:
        column: The column, or all columns of a cross.
        stored: Instead of `values`, where they are many.
    """

    kind: Literal["category"] = "category"
    column: str | tuple[str, ...]
    values: tuple[str | None, ...] | None = None
    stored: Stored | None = None
    buckets: int | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """Names its place in the input."""
        return _joined(self.column)

    @property
    def num_ids(self) -> int:
        """Distinct ids."""
        return self.buckets or (self.stored.size if self.stored else len(self.values or ())) + 1


class FittedEncoding(_Frozen):
    """How a value becomes a number of its own.

    Attributes:
        column: The column, or all columns of a cross.
        values: The values that have one.
        numbers: It, for each of them.
        stored: Instead of `values`, `numbers` and `folds`, where they are many.
        other: For any other value.
        folds: For target encoding, the numbers that the training rows of each fold take, likewise; a value that is
            seen in its own fold only takes that fold's `other`.
        fold_others: `other` for the training rows of each fold.
        seed: Of the folds.
    """

    kind: Literal["encoding"] = "encoding"
    column: str | tuple[str, ...]
    values: tuple[str | None, ...] = ()
    numbers: tuple[float, ...] = ()
    stored: Stored | None = None
    other: float
    folds: tuple[tuple[float, ...], ...] = ()
    fold_others: tuple[float, ...] = ()
    seed: int = 0

    @property
    def name(self) -> str:
        """Names its place in the input."""
        return _joined(self.column)


FittedColumn = Annotated[FittedNumber | FittedIndicator | FittedCategory | FittedEncoding, Field(discriminator="kind")]


def _joined(column: str | tuple[str, ...]) -> str:
    return column if isinstance(column, str) else " x ".join(column)


def stepped_array(steps: Iterable[NumberStep], values: Floats) -> Floats:
    """What the steps make of numbers, of which NaN is missing; `values` stays as it is."""
    for step in steps:
        match step:
            case Fill():
                values = np.where(np.isnan(values), step.value, values)
            case Log1p():
                values = np.log1p(np.where(values < 0, 0.0, values))
            case SignedLog():
                values = np.sign(values) * np.log1p(np.abs(values))
            case Clip():
                if step.low is not None:
                    values = np.where(values < step.low, step.low, values)
                if step.high is not None:
                    values = np.where(values > step.high, step.high, values)
            case Scale():
                values = (values - step.shift) * step.factor
    return values


class FittedImage(_Frozen):
    """One uint8 image a row, its pixels or a PNG or JPEG file."""

    of: Literal["image"] = "image"
    source: str
    shape: tuple[int, ...]
    scale: tuple[float, float] = (0.0, 1.0)
    encoded: bool = False


class FittedVector(_Frozen):
    """A list of numbers of one width: (x - shift) * factor, then its places along the components.

    Attributes:
        components: Shape (components, width); empty where the vector keeps its places.
    """

    of: Literal["vector"] = "vector"
    source: str
    width: int
    shift: tuple[float, ...] = ()
    factor: tuple[float, ...] = ()
    components: tuple[tuple[float, ...], ...] = ()


class FittedSparse(_Frozen):
    """A sparse vector of `size` places."""

    of: Literal["sparse"] = "sparse"
    source: str
    size: int


class FittedList(_Frozen):
    """A list of values, or a text of tokens: as (ids, weights), or as ids of fixed length.

    Attributes:
        category: Gives the id of a value. In a sequence ids are higher by 1, since 0 is padding.
        idf: For each id log((rows + 1) / (rows with it + 1)); empty where the weights are others.
        components: The vectors along which a bag's weights are given instead, shape (components, ids); or empty.
    """

    of: Literal["list"] = "list"
    source: str
    tokens: Tokens | None = None
    category: FittedCategory
    form: Bag | Sequence
    idf: tuple[float, ...] = ()
    components: tuple[tuple[float, ...], ...] = ()


Whole = Annotated[FittedImage | FittedVector | FittedSparse | FittedList, Field(discriminator="of")]


class FittedInput(_Frozen):
    """One input: its columns in order, or one column that is taken as a whole."""

    name: str
    kind: Literal["dense", "ids", "image", "sparse", "sequence"]
    columns: tuple[FittedColumn, ...] = ()
    whole: Whole | None = None


class FittedLabel(_Frozen):
    """How the label becomes a class index or a number."""

    spec: LabelSpec
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()


NO_LABEL = FittedLabel(spec=LabelSpec(kind="none", column=""))


class FittedFeatures(_Frozen):
    """The transform of a workload, fitted on its training split.

    Attributes:
        columns: The source's columns that the inputs read, and their types as in `source.schema`.
    """

    inputs: tuple[FittedInput, ...]
    label: FittedLabel
    columns: dict[str, str] = {}
    recommended: Recommended | None = None

    @cached_property
    def digest(self) -> str:
        """Names the transform."""
        return digest_of(
            self.with_stored(lambda at: at.model_copy(update={"folder": "", "files": ()})).model_dump(mode="json")
        )

    @property
    def stored(self) -> list[Stored]:
        """The values beside the JSON."""
        columns = [column for group in self.inputs for column in group.columns]
        return [c.stored for c in columns if isinstance(c, FittedCategory | FittedEncoding) and c.stored]

    def with_stored(self, moved: Callable[[Stored], Stored]) -> "FittedFeatures":
        """The same transform with its stored values elsewhere."""

        def of_column(column: FittedColumn) -> FittedColumn:
            if isinstance(column, FittedCategory | FittedEncoding) and column.stored:
                return column.model_copy(update={"stored": moved(column.stored)})
            return column

        inputs = [group.model_copy(update={"columns": tuple(map(of_column, group.columns))}) for group in self.inputs]
        return self.model_copy(update={"inputs": tuple(inputs)})

    def contract(self, *, sparse_widths: dict[str, int]) -> Contract:
        """The columns that the feature tables have.

        Args:
            sparse_widths: For each sparse input, the places to which its lists are padded.
        """
        columns = [Column(name="row_id", kind="row_id", dtype="int64")]
        for fitted in self.inputs:
            columns += _columns_of(fitted, sparse_widths.get(fitted.name, 0))
        if self.label.spec.has_column:
            columns.append(_label_column(self.label.spec))
        return Contract(columns=tuple(columns), label=self.label.spec, recommended=self.recommended)


class Bundle(_Frozen):
    """What stands beside a logged model's files, so that it takes raw rows wherever it is.

    Attributes:
        name: The estimator's or network's own name.
        gives: What it says of a row: the label, or an affinity, by which items are ranked for a user.
        contract: The columns that it was trained on.
    """

    name: str
    kind: Literal["classic", "torch"]
    gives: Literal["prediction", "affinity"] = "prediction"
    fitted: FittedFeatures
    contract: Contract

    @property
    def has_factors(self) -> bool:
        """Whether it gives users and items vectors whose product ranks."""
        return self.name == "ALS" or self.gives == "affinity"

    def save(self, folder: Path) -> None:
        """Write the JSON and copies of the stored values."""

        def copied(stored: Stored) -> Stored:
            target = folder / VALUES_FOLDER / Path(stored.folder).name
            target.mkdir(parents=True)
            for path in stored.paths():
                shutil.copy2(path, target)
            return stored.model_copy(update={"folder": f"{VALUES_FOLDER}/{target.name}"})

        saved = self.model_copy(update={"fitted": self.fitted.with_stored(copied)})
        (folder / BUNDLE_FILE).write_text(saved.model_dump_json(indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Bundle":
        """What `save` wrote there."""
        bundle = cls.model_validate_json((folder / BUNDLE_FILE).read_bytes())
        placed = bundle.fitted.with_stored(lambda at: at.model_copy(update={"folder": str(folder / at.folder)}))
        return bundle.model_copy(update={"fitted": placed})


def _label_column(spec: LabelSpec) -> Column:
    if spec.kind == "multilabel":
        return Column(name="label", kind="label", dtype="int8", shape=(len(spec.classes),))
    if spec.event:
        return Column(name="label", kind="label", dtype="float64", shape=(2,), names=(spec.column, spec.event))
    return Column(name="label", kind="label", dtype="float64" if spec.is_number else "int64")


def _columns_of(fitted: FittedInput, width: int) -> list[Column]:
    name = fitted.name
    match fitted.whole:
        case None:
            names = tuple(column.name for column in fitted.columns)
            if fitted.kind == "dense":
                return [Column(name=name, kind="dense", dtype="float32", shape=(len(names),), names=names)]
            shape = (len(names),)
            sizes = tuple(c.num_ids for c in fitted.columns if isinstance(c, FittedNumber | FittedCategory))
            ordered = tuple(isinstance(c, FittedNumber) for c in fitted.columns)
            return [
                Column(name=name, kind="ids", dtype="int64", shape=shape, names=names, sizes=sizes, ordered=ordered)
            ]
        case FittedImage() as image:
            return [Column(name=name, kind="image", dtype="uint8", shape=image.shape, scale=image.scale)]
        case FittedVector() as vector:
            return [Column(name=name, kind="dense", dtype="float32", shape=(len(vector.components) or vector.width,))]
        case FittedList(form=Sequence()) as found:
            size = found.category.num_ids + 1
            return [Column(name=name, kind="sequence", dtype="int64", shape=(found.form.length,), sizes=(size,))]
        case FittedList(components=components) if components:
            return [Column(name=name, kind="dense", dtype="float32", shape=(len(components),))]
        case FittedList() as found:
            width, size = found.form.length, found.category.num_ids
        case FittedSparse() as sparse:
            size = sparse.size
    return [
        Column(name=f"{name}_ids", kind="sparse_ids", dtype="int64", shape=(width,), sizes=(size,)),
        Column(name=f"{name}_weights", kind="sparse_weights", dtype="float32", shape=(width,)),
    ]
