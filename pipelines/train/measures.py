"""The metrics of a validation pass that loss and accuracy do not give, over all ranks and in constant memory."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.lake import LabelSpec
from pipelines.lake.contract import SMALLEST_RATE
from pipelines.models.build import predicted

_BITS = 18  # leading ones of an output, by which rows are ranked: sign, exponent, and 9 of the fraction


class Measures:
    """`auc` and `pr_auc` of a binary label, `mae` and `r2` of a real one, `mae` and `poisson_deviance` of a count.

    Rows are counted by class in a histogram of their outputs' leading bits, which are in the order of the numbers; two
    outputs within a part in 512 of each other count as tied. For 200,000 rows it is exact to 1e-6
    (`tests/train/test_measures.py`).

    Args:
        spec: What the label means.
        device: Where the outputs are.
    """

    def __init__(self, spec: LabelSpec, device: torch.device) -> None:
        self._spec = spec
        self._counts = torch.zeros(2 << _BITS if spec.kind == "binary" else 0, dtype=torch.int64, device=device)
        self._sums = torch.zeros(5, dtype=torch.float64, device=device)

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """Count rows; outputs of shape (B, K), labels of shape (B,)."""
        if self._spec.kind == "binary":
            places = _ranked(outputs[:, 0]) + (labels > 0).long() * (1 << _BITS)
            self._counts += torch.bincount(places, minlength=len(self._counts))
        elif self._spec.is_number:
            label, prediction = labels.double(), predicted(outputs[:, 0].double(), self._spec)
            error, away = prediction - label, label - self._spec.mean  # about the mean, so that squares lose no digits
            cost = _deviance(label, prediction) if self._spec.kind == "count" else error.square()
            parts = [torch.ones_like(label), error.abs(), cost, away, away.square()]
            self._sums += torch.stack(parts).sum(dim=1)

    def reduced(self) -> dict[str, float]:
        """The metrics over all ranks; collective. One that is not defined, as of a single class, is left out."""
        if self._spec.kind == "binary":
            dist.all_reduce(self._counts)
            return _areas(self._counts.view(2, -1).flip(1).cpu().numpy())
        if self._spec.is_number:
            dist.all_reduce(self._sums)
            rows, distance, costs, labels, label_squares = self._sums.tolist()
            found = {"mae": distance / max(rows, 1.0)}
            if self._spec.kind == "count":
                return found | {"poisson_deviance": costs / max(rows, 1.0)}
            spread = label_squares - labels**2 / max(rows, 1.0)
            return found | ({"r2": 1.0 - costs / spread} if spread > 0 else {})
        return {}


def _deviance(label: Tensor, rate: Tensor) -> Tensor:
    """Each row's Poisson deviance, as `metrics` has it. Shape (B,)."""
    rate = rate.clamp(min=SMALLEST_RATE)
    return 2.0 * (torch.xlogy(label, label / rate) - label + rate)


def _ranked(outputs: Tensor) -> Tensor:
    """The leading bits of float32 numbers as whole numbers in the same order, from 0. Shape (B,)."""
    bits = (outputs.float() + 0.0).view(torch.int32)  # -0 becomes 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # of negative numbers the larger bits are the smaller number
    return ((ordered >> (32 - _BITS)) + (1 << (_BITS - 1))).long()


def _areas(counts: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]") -> dict[str, float]:
    """The areas under both curves by the trapezoidal rule, as `metrics.ranking` has them.

    Args:
        counts: Rows of class 0 and 1 by output, the highest first. Shape (2, bins).
    """
    negative, positive = counts[:, counts.sum(axis=0) > 0].astype(np.float64)
    negatives, positives = negative.sum(), positive.sum()
    if not negatives or not positives:
        return {}
    so_far = positive.cumsum()
    precision = so_far / (so_far + negative.cumsum())
    before = np.concatenate([precision[:1], precision[:-1]])
    return {
        "auc": float((negative * (so_far - positive / 2)).sum() / (negatives * positives)),
        "pr_auc": float((positive * (precision + before) / 2).sum() / positives),
    }
