"""The contract of a feature table: its columns, their dtypes and shapes, and what the label means."""

import math
from collections.abc import Collection, Mapping
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from pipelines.config.features import NUMBERS, LabelKind
from pipelines.errors import ConfigError

CONTRACT_KEY = "headrace.contract"
HAS_CLASS = 0.5  # from this probability on a multilabel row is said to have a class
SMALLEST_RATE = 1e-6  # a predicted rate below it counts as this in the Poisson deviance
UNKNOWN = "\ufffd"  # what stands for a token that is out of vocabulary
Dtype = Literal["bool", "int8", "uint8", "int16", "int32", "int64", "float32", "float64"]


class Frozen(BaseModel):
    """A value that travels as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Column(Frozen):
    """One column of a feature table.

    Attributes:
        kind: What it means; `value` in a table without a contract. A sparse input is two columns, its ids and its
            weights; in a sequence of ids 0 is padding.
        dtype: numpy's name of an element.
        shape: Shape of one row's value; `()` for a scalar.
        names: The source columns behind each place, where there are such.
        sizes: For ids, the number of distinct ids of each place; for sparse ids and a sequence, of all.
        ordered: For ids, whether those of each place rise with what they stand for, as buckets do.
        scale: For images, what 0 and 255 become in torch.
    """

    name: str
    kind: Literal["row_id", "label", "dense", "ids", "image", "sparse_ids", "sparse_weights", "sequence", "value"]
    dtype: Dtype
    shape: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    ordered: tuple[bool, ...] = ()
    scale: tuple[float, float] = (0.0, 1.0)

    @property
    def input(self) -> str:
        """The config's name of the input that it belongs to."""
        return self.name.removesuffix(self.kind.removeprefix("sparse")) if self.kind.startswith("sparse") else self.name

    @property
    def width(self) -> int:
        """Elements of one row's value."""
        return math.prod(self.shape)

    @property
    def bytes_per_row(self) -> int:
        """Raw bytes of one row's value."""
        return self.width * np.dtype(self.dtype).itemsize

    @property
    def scaled_bytes_per_row(self) -> int:
        """The same once pixels are float32."""
        return self.bytes_per_row * (4 if self.kind == "image" and self.dtype == "uint8" else 1)


class LabelSpec(Frozen):
    """What the label means.

    Attributes:
        kind: `none` where a workload has no label.
        column: That of the source; empty where there is no label. Of next_token that of the sequence.
        event: For survival, the column that says whether the event was seen; a label is then the time and 0 or 1.
        classes: For class labels, the value behind each class index. For next_token, that behind each id: nothing for
            padding, `UNKNOWN` for what is out of vocabulary.
        counts: How many training rows each class has; of a multilabel label a row counts for each of its classes.
        mean: For a number, its mean over the training split. For a real label the networks learn (label - mean) / std,
            for a count log(rate / mean).
        std: For a real label, its standard deviation there, 1 where it is constant.
    """

    kind: LabelKind | Literal["none"]
    column: str
    event: str | None = None
    classes: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    @property
    def is_number(self) -> bool:
        """Whether the label is a number, and predicted as one."""
        return self.kind in NUMBERS

    @property
    def has_column(self) -> bool:
        """Whether feature tables have a column of it."""
        return self.kind not in ("none", "next_token")

    @property
    def num_outputs(self) -> int:
        """Outputs that a network needs: a logit a class, or a token at each place; one for a binary label or a number."""
        return len(self.classes) if self.kind in ("multiclass", "multilabel", "next_token") else 1

    def weights(self, wanted: Literal["balanced"] | Mapping[str | int, float] | None) -> tuple[float, ...]:
        """What a row of each class counts in training, 1 on average over the training rows; empty for all alike.

        Args:
            wanted: `balanced`, for the same sum over each class; or a weight a class.

        Raises:
            ConfigError: A class is not one of the label's.
        """
        if wanted is None:
            return ()
        if wanted == "balanced":
            weights = [1.0 / max(num, 1) for num in self.counts]
        else:
            named = {str(value): weight for value, weight in wanted.items()}
            if unknown := set(named) - set(self.classes):
                raise ConfigError(
                    f"class_weights: wanted classes among {', '.join(self.classes[:20])}, seen {', '.join(sorted(unknown))}"
                )
            weights = [named.get(value, 1.0) for value in self.classes]
        total = sum(num * weight for num, weight in zip(self.counts, weights, strict=True))
        return tuple(weight * sum(self.counts) / total for weight in weights)


class Recommended(Frozen):
    """Which inputs of one id each are users and items.

    Attributes:
        user: Name of the column.
        item: Likewise.
        item_counts: How many training rows each item id has. Shape (items,), of which 0 is out of vocabulary.
    """

    user: str
    item: str
    item_counts: tuple[int, ...]


class Contract(Frozen):
    """The columns of a feature table and their meaning; travels in the commit's `userMetadata`."""

    columns: tuple[Column, ...]
    label: LabelSpec
    recommended: Recommended | None = None

    @property
    def inputs(self) -> tuple[Column, ...]:
        """The columns that a model takes, in the order of its arguments."""
        return tuple(column for column in self.columns if column.kind not in ("row_id", "label"))

    @property
    def target(self) -> str:
        """The column that a network's outputs are compared with: the label, or the sequence whose next ids they foretell."""
        return self.inputs[0].name if self.label.kind == "next_token" else "label"

    @property
    def row_outputs(self) -> int:
        """Of how many places a network has outputs in a row: one, but of a sequence all that have a next one."""
        return self.inputs[0].width - 1 if self.label.kind == "next_token" else 1

    def of_inputs(self, names: Collection[str]) -> "Contract":
        """The same with only these inputs of the config."""
        kept = [column for column in self.columns if column not in self.inputs or column.input in names]
        return self.model_copy(update={"columns": tuple(kept)})
