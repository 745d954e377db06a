"""What a rank adds up over an epoch, from each batch after its optimizer step."""

import numpy as np
import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from pipelines.lake import LabelSpec, Snapshot
from pipelines.models.build import row_scores
from pipelines.stream.batches import Batch
from pipelines.stream.receipt import EpochReceipt
from pipelines.train.measures import Measures

WAITING_ELEMENTS = 1 << 16  # outputs that are kept until they are added up: a few large operations, not many small ones


class Sums(BaseModel):
    """A tally over all ranks, as a checkpoint holds it.

    Attributes:
        loss: Sum of the rows' losses.
        score: Sum of the rows' scores, by which accuracy, the Hamming loss or RMSE is taken.
    """

    model_config = ConfigDict(frozen=True)

    rows: int = 0
    row_id_sum: int = 0
    loss: float = 0.0
    score: float = 0.0

    def mean_loss(self) -> float:
        """The mean loss of a row."""
        return self.loss / max(self.rows, 1)

    def metrics(self, spec: LabelSpec | None) -> dict[str, float]:
        """Accuracy, with the perplexity of a sequence; the Hamming loss of several classes a row, or RMSE of a number; none
        where outputs say nothing of it.
        """
        if spec is None:
            return {}
        mean = self.score / max(self.rows, 1)
        if spec.is_number:
            return {"rmse": mean**0.5}
        if spec.kind == "next_token":
            return {"accuracy": mean, "perplexity": float(np.exp(self.mean_loss()))}
        return {"hamming_loss" if spec.kind == "multilabel" else "accuracy": mean}


class Tally:
    """Receipt, loss and score of this rank; sums stay on its device, so that no step waits for a number.

    Args:
        snapshot: What the epoch reads.
        spec: What the label means; None where outputs say nothing of it.
        device: Where the rank computes.
        before: What all ranks together had when the epoch was interrupted; one rank takes it over.
        measures: Are given the rows as well, where there are any.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        spec: LabelSpec | None,
        device: torch.device,
        *,
        before: Sums | None = None,
        measures: Measures | None = None,
    ) -> None:
        before = before or Sums()
        self.receipt = EpochReceipt(snapshot)
        self.receipt.load_state_dict({"rows": before.rows, "row_id_sum": before.row_id_sum})
        self._spec, self._device, self._measures = spec, device, measures
        self._sums = torch.tensor([before.loss, before.score], dtype=torch.float64, device=device)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._waiting_elements = 0

    def add(self, batch: Batch, labels: Tensor, outputs: Tensor, loss: Tensor) -> None:
        """Count a batch with rows; labels and outputs are on the device, `loss` is the sum of its rows'."""
        self.receipt.add(batch)
        self._waiting.append((labels, outputs.detach(), loss.detach()))
        self._waiting_elements += outputs.numel()
        if self._waiting_elements >= WAITING_ELEMENTS:
            self._add_up()

    def mean_loss(self) -> float:
        """The mean loss of this rank's rows so far."""
        self._add_up()
        return float(self._sums[0]) / max(self.receipt.rows, 1)

    def reduced(self) -> Sums:
        """The sums over all ranks; collective."""
        self._add_up()
        rows, row_ids = self.receipt.reduced(self._device)
        sums = self._sums.clone()
        dist.all_reduce(sums)
        return Sums(rows=rows, row_id_sum=row_ids, loss=float(sums[0]), score=float(sums[1]))

    def _add_up(self) -> None:
        if not self._waiting:
            return
        labels, outputs, losses = zip(*self._waiting, strict=True)
        self._waiting, self._waiting_elements = [], 0
        self._sums[0] += torch.stack(losses).sum(dtype=torch.float64)
        all_outputs, all_labels = torch.cat(outputs), torch.cat(labels)
        if self._spec:
            self._sums[1] += row_scores(all_outputs, all_labels, self._spec).sum(dtype=torch.float64)
        if self._measures:
            self._measures.add(all_outputs, all_labels)
