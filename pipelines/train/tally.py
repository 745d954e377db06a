"""What a rank adds up over an epoch, from the rows of each batch after its optimizer step."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.lake import UINT64, LabelSpec
from pipelines.models.build import row_scores

TALLY_ELEMENTS = 1 << 16  # outputs that are kept until they are added up: a few large operations, not many small ones


@dataclass
class Tally:
    """Sums in tensors on the rank's device, so that no step waits for a number.

    Attributes:
        row_ids: Sum of the row ids, which wraps as int64 does, so modulo 2^64.
    """

    spec: LabelSpec
    rows: Tensor
    row_ids: Tensor
    loss: Tensor
    score: Tensor
    waiting: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)
    waiting_elements: int = 0

    @classmethod
    def zero(cls, spec: LabelSpec, device: torch.device) -> "Tally":
        """Nothing added yet."""
        whole = torch.zeros((), dtype=torch.int64, device=device)
        real = torch.zeros((), dtype=torch.float64, device=device)
        return cls(spec=spec, rows=whole.clone(), row_ids=whole.clone(), loss=real.clone(), score=real.clone())

    def add(self, tensors: dict[str, Tensor], outputs: Tensor, loss: Tensor) -> None:
        """Count the rows of one batch, each by its row id; `loss` is the sum of theirs."""
        self.waiting.append((tensors["row_id"], tensors["label"], outputs.detach(), loss.detach()))
        self.waiting_elements += outputs.numel()
        if self.waiting_elements >= TALLY_ELEMENTS:
            self._add_up()

    def _add_up(self) -> None:
        if not self.waiting:
            return
        *rows, losses = zip(*self.waiting, strict=True)
        row_ids, labels, outputs = (torch.cat(parts) for parts in rows)
        self.waiting, self.waiting_elements = [], 0
        self.rows += row_ids.numel()
        self.row_ids += row_ids.sum()
        self.loss += torch.stack(losses).sum(dtype=torch.float64)
        self.score += row_scores(outputs, labels, self.spec).sum(dtype=torch.float64)

    def mean_loss(self) -> float:
        """The mean loss of this rank's rows so far."""
        self._add_up()
        return float(self.loss) / max(int(self.rows), 1)

    def reduced(self) -> tuple[int, int, float, dict[str, float]]:
        """Over all ranks: rows, row id sum modulo 2^64, mean loss, metrics."""
        self._add_up()
        whole, real = torch.stack([self.rows, self.row_ids]), torch.stack([self.loss, self.score])
        dist.all_reduce(whole)
        dist.all_reduce(real)
        rows, row_ids = (int(x) for x in whole)
        mean = real / max(rows, 1)
        score = float(mean[1])
        metrics = {"rmse": score**0.5} if self.spec.kind == "real" else {"accuracy": score}
        return rows, row_ids % UINT64, float(mean[0]), metrics
