"""The metrics of a validation pass that loss and accuracy do not give, over all ranks and in constant memory."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from pipelines.bootstrap import Floats, f1_score
from pipelines.lake import LabelSpec
from pipelines.lake.contract import SMALLEST_RATE
from pipelines.models.build import predicted

_BITS = 18  # leading ones of an output, by which rows are ranked: sign, exponent, and 9 of the fraction


class Measures:
    """`auc` and `pr_auc` of a binary label; `f1_micro`, `f1_macro` and `log_loss` of a multilabel one; `mae` and `r2` of a
    real one; `mae` and `poisson_deviance` of a count.

    Of a binary label rows are counted by class in a histogram of their outputs' leading bits, which are in the order of
    the numbers; two outputs within a part in 512 of each other count as tied. For 200,000 rows it is exact to 1e-6
    (`tests/train/test_measures.py`).

    Args:
        spec: What the label means.
        device: Where the outputs are.
    """

    def __init__(self, spec: LabelSpec, device: torch.device) -> None:
        self._spec, self._way = spec, _WAYS.get(spec.kind)
        self._sums = torch.zeros(
            self._way.parts if self._way else 0, spec.num_outputs, dtype=torch.float64, device=device
        )

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """Count rows; outputs of shape (B, K), labels of shape (B,), or (B, K) of a multilabel one."""
        if self._way:
            self._sums += self._way.add_up(outputs, labels.view(-1, outputs.shape[1]), self._spec)

    def reduced(self) -> dict[str, float]:
        """The metrics over all ranks; collective. One that is not defined, as of a single class, is left out."""
        if self._way is None:
            return {}
        dist.all_reduce(self._sums)
        return self._way.metrics(self._sums.cpu().numpy())


def _histogram(outputs: Tensor, labels: Tensor, spec: LabelSpec) -> Tensor:
    """Rows by class and leading bits of the output, shape (2 * bins, 1)."""
    places = _ranked(outputs[:, 0]) + (labels[:, 0] > 0).long() * (1 << _BITS)
    return torch.bincount(places, minlength=2 << _BITS)[:, None]


def _errors(outputs: Tensor, labels: Tensor, spec: LabelSpec) -> Tensor:
    """Rows, and sums of absolute and squared errors, labels, their squares, shape (5, 1)."""
    label, prediction = labels.double(), predicted(outputs.double(), spec)
    error, away = prediction - label, label - spec.mean  # about the mean, so that squares lose no digits
    return torch.stack([torch.ones_like(label), error.abs(), error.square(), away, away.square()]).sum(dim=1)


def _deviances(outputs: Tensor, labels: Tensor, spec: LabelSpec) -> Tensor:
    """Rows, and sums of absolute errors and of Poisson deviances as `metrics` has them, shape (3, 1)."""
    label, rate = labels.double(), predicted(outputs.double(), spec)
    bounded = rate.clamp(min=SMALLEST_RATE)
    deviance = 2.0 * (torch.xlogy(label, label / bounded) - label + bounded)
    return torch.stack([torch.ones_like(label), (rate - label).abs(), deviance]).sum(dim=1)


def _of_classes(outputs: Tensor, labels: Tensor, spec: LabelSpec) -> Tensor:
    """For each class rows, hits, wrong answers and the sum of log losses, shape (4, K)."""
    chosen, has = outputs >= 0, labels > 0
    loss = F.binary_cross_entropy_with_logits(outputs.double(), labels.double(), reduction="none")
    return torch.stack([torch.ones_like(loss), (chosen & has).double(), (chosen != has).double(), loss]).sum(dim=1)


def _ranked(outputs: Tensor) -> Tensor:
    """The leading bits of float32 numbers as whole numbers in the same order, from 0. Shape (B,)."""
    bits = (outputs.float() + 0.0).view(torch.int32)  # -0 becomes 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # of negative numbers the larger bits are the smaller number
    return ((ordered >> (32 - _BITS)) + (1 << (_BITS - 1))).long()


def _areas(sums: Floats) -> dict[str, float]:
    """The areas under both curves by the trapezoidal rule, as `metrics.ranking` has them."""
    counts = sums.reshape(2, -1)[:, ::-1]  # of class 0 and 1 by output, the highest first
    negative, positive = counts[:, counts.sum(axis=0) > 0]
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


def _of_errors(sums: Floats) -> dict[str, float]:
    rows, distance, squares, labels, label_squares = sums[:, 0].tolist()
    spread = label_squares - labels**2 / max(rows, 1.0)
    return {"mae": distance / max(rows, 1.0)} | ({"r2": 1.0 - squares / spread} if spread > 0 else {})


def _of_deviances(sums: Floats) -> dict[str, float]:
    rows, distance, deviance = sums[:, 0].tolist()
    return {"mae": distance / max(rows, 1.0), "poisson_deviance": deviance / max(rows, 1.0)}


def _f1_scores(sums: Floats) -> dict[str, float]:
    rows, hits, wrong, loss = sums
    found = {"f1_micro": f1_score(hits.sum(), wrong.sum()), "f1_macro": f1_score(hits, wrong)}
    return found | {"log_loss": float(loss.sum() / max(rows.sum(), 1.0))}


class _Way(NamedTuple):
    """How the metrics of a kind of label are found: what batches add up to, shape (parts, K), and what it says."""

    parts: int
    add_up: Callable[[Tensor, Tensor, LabelSpec], Tensor]
    metrics: Callable[[Floats], dict[str, float]]


_WAYS = {
    "binary": _Way(2 << _BITS, _histogram, _areas),
    "multilabel": _Way(4, _of_classes, _f1_scores),
    "real": _Way(5, _errors, _of_errors),
    "count": _Way(3, _deviances, _of_deviances),
}
