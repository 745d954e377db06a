"""How well a table's rows are shuffled, by a sample: runs of equal labels, and how alike neighbours are."""

import math

import numpy as np
from pydantic import BaseModel, ConfigDict

from pipelines.features.fitted import Floats
from pipelines.features.sample import Sample, places


class ShuffleQuality(BaseModel):
    """Figures of the order of rows in a table's files.

    Attributes:
        rows: Rows that were looked at.
        label_run_length: Mean length of a run of equal class labels over that of a perfect shuffle, as in the test of
            Wald and Wolfowitz (1940): 1 is perfect, more is clumped. None without a class label.
        neighbour_correlation: The largest autocorrelation at lag 1 of a place of a column: 0 is perfect, -1 and 1 are
            an order.
        column: The place that has it.
    """

    model_config = ConfigDict(frozen=True)

    rows: int
    label_run_length: float | None
    neighbour_correlation: float
    column: str

    @property
    def is_shuffled(self) -> bool:
        """Whether the figures are what chance may give."""
        noise = 4 / math.sqrt(max(self.rows, 1))
        return (self.label_run_length or 1.0) < 1.1 + noise and abs(self.neighbour_correlation) < 0.05 + noise

    def __str__(self) -> str:
        runs = "" if self.label_run_length is None else f"label runs {self.label_run_length:.2f} times a shuffle's, "
        return f"{runs}neighbours correlate by {self.neighbour_correlation:+.3f} ({self.column}; {self.rows:,} rows)"


def shuffle_quality(sample: Sample) -> ShuffleQuality:
    """The figures of a sample in file order; a run or a pair of neighbours never spans two files."""
    strongest, place = 0.0, "none"
    for column in sample.columns:
        parts = [file[column.name].reshape(len(file[column.name]), -1).astype(np.float64) for file in sample.files]
        if sum(max(0, len(part) - 1) for part in parts):
            found = _autocorrelation(parts)
            at = int(np.abs(found).argmax())
            if abs(found[at]) > abs(strongest):
                strongest, place = float(found[at]), places(column)[at]
    label = next((column.name for column in sample.columns if column.name == "label" and column.dtype == "int64"), "")
    return ShuffleQuality(
        rows=sum(len(next(iter(file.values()))) for file in sample.files),
        label_run_length=_run_length([file[label] for file in sample.files]) if label else None,
        neighbour_correlation=strongest,
        column=place,
    )


def _autocorrelation(parts: list[Floats]) -> Floats:
    """At lag 1, of each column of the parts together; 0 where a column is constant. Shape (width,)."""
    whole = np.concatenate(parts)
    mean, variance = whole.mean(axis=0), whole.var(axis=0)
    together: Floats = sum(((part[1:] - mean) * (part[:-1] - mean)).sum(axis=0) for part in parts)
    pairs = sum(max(0, len(part) - 1) for part in parts)
    return np.divide(together, pairs * variance, out=np.zeros_like(variance), where=variance > 0)


def _run_length(parts: list[Floats]) -> float:
    """Runs that a perfect shuffle is expected to have, over those seen."""
    _, counts = np.unique(np.concatenate(parts), return_counts=True)
    num = counts.sum()
    unequal = 1.0 - float((counts * (counts - 1)).sum()) / max(1, num * (num - 1))  # two rows drawn from all
    expected = sum(1 + (len(part) - 1) * unequal for part in parts)
    seen = sum(1 + int((part[1:] != part[:-1]).sum()) for part in parts)
    return float(expected / seen) if seen else 1.0
