"""FittedFeatures: the fitted transform as JSON, for MLlib, torch and serving alike."""

from functools import cached_property
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pipelines.lake import Column, Contract, LabelSpec
from pipelines.receipt import digest_of


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FittedNumber(_Frozen):
    """How a number becomes a float or a bucket: fill, then log1p, then (x - shift) * scale or the bucket's index.

    Attributes:
        fill: What stands for a missing value, before log1p.
        splits: For ids, rising boundaries; bucket i holds [splits[i-1], splits[i]), missing is the last bucket.
    """

    column: str
    fill: float | None
    log1p: bool = False
    shift: float = 0.0
    scale: float = 1.0
    splits: tuple[float, ...] | None = None

    @property
    def num_ids(self) -> int:
        """Ids when bucketized: one more than the splits, and one for missing."""
        return len(self.splits or ()) + 2


class FittedCategory(_Frozen):
    """How a value becomes an id: its place in `values` from 1, 0 where it is not there; or a hash bucket."""

    column: str
    values: tuple[str | None, ...] | None = None
    buckets: int | None = None
    seed: int = 0

    @property
    def num_ids(self) -> int:
        """Distinct ids."""
        return self.buckets or len(self.values or ()) + 1


class FittedInput(_Frozen):
    """One input: its columns in order, and for whole columns (image, vector, sparse) their dimensions."""

    name: str
    kind: Literal["dense", "ids", "image", "sparse"]
    columns: tuple[FittedNumber | FittedCategory, ...] = ()
    source: str = ""
    shape: tuple[int, ...] = ()
    scale: tuple[float, float] = (0.0, 1.0)
    size: int = 0


class FittedLabel(_Frozen):
    """How the label becomes a class index or a number."""

    spec: LabelSpec
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()


class FittedFeatures(_Frozen):
    """The transform of a workload, fitted on its training split."""

    inputs: tuple[FittedInput, ...]
    label: FittedLabel

    @cached_property
    def digest(self) -> str:
        """Names the transform."""
        return digest_of(self.model_dump(mode="json"))

    def contract(self, *, sparse_widths: dict[str, int]) -> Contract:
        """The columns that the feature tables have.

        Args:
            sparse_widths: For each sparse input, the places to which its lists are padded.
        """
        columns = [Column(name="row_id", kind="row_id", dtype="int64")]
        for fitted in self.inputs:
            columns += _columns_of(fitted, sparse_widths.get(fitted.name, 0))
        dtype: Literal["int64", "float64"] = "float64" if self.label.spec.kind == "real" else "int64"
        columns.append(Column(name="label", kind="label", dtype=dtype))
        return Contract(columns=tuple(columns), label=self.label.spec)


class Bundle(_Frozen):
    """What stands beside a logged model's files, so that it takes raw rows wherever it is.

    Attributes:
        name: The estimator's or network's own name.
        contract: The columns that it was trained on.
    """

    name: str
    kind: Literal["classic", "torch"]
    fitted: FittedFeatures
    contract: Contract


def _columns_of(fitted: FittedInput, width: int) -> list[Column]:
    names = tuple(column.column for column in fitted.columns)
    if fitted.kind == "dense":
        shape = fitted.shape or (len(names),)
        return [Column(name=fitted.name, kind="dense", dtype="float32", shape=shape, names=names)]
    if fitted.kind == "ids":
        sizes = tuple(column.num_ids for column in fitted.columns)
        return [Column(name=fitted.name, kind="ids", dtype="int64", shape=(len(names),), names=names, sizes=sizes)]
    if fitted.kind == "image":
        return [Column(name=fitted.name, kind="image", dtype="uint8", shape=fitted.shape, scale=fitted.scale)]
    return [
        Column(name=f"{fitted.name}_ids", kind="sparse_ids", dtype="int64", shape=(width,), sizes=(fitted.size,)),
        Column(name=f"{fitted.name}_weights", kind="sparse_weights", dtype="float32", shape=(width,)),
    ]
