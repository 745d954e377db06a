"""EpochReceipt: the rows that were trained on, counted and summed by their row_id, against the Snapshot's."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.errors import TrainingError
from pipelines.lake import ROW_ID, UINT64, Snapshot
from pipelines.stream.batches import Batch

_WAITING = 256  # row ids of so many batches are kept until they are added up: one large operation, not many small ones


class EpochReceipt:
    """What one rank trained on in an epoch; with those of the other ranks it must equal the Snapshot.

    Add each batch after its optimizer step. Drops and repeats change the count, exchanges the sum.

    Attributes:
        rows: Rows of this rank so far.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.rows = 0
        self._row_ids = 0
        self._waiting: list[Tensor] = []

    def add(self, batch: Batch) -> None:
        """Count a batch; the row of zeros of a rank without rows does not count."""
        if not batch.rows:
            return
        self.rows += batch.rows
        self._waiting.append(batch.tensors[ROW_ID])
        if len(self._waiting) >= _WAITING:
            self._add_up()

    def reduced(self, device: torch.device | None = None) -> tuple[int, int]:
        """Rows and row_id sum modulo 2^64 over all ranks; collective where torch.distributed is initialized."""
        self._add_up()
        sums = torch.tensor([self.rows, _signed(self._row_ids)], dtype=torch.int64, device=device)
        if dist.is_initialized():
            dist.all_reduce(sums)  # int64 wraps, so modulo 2^64
        return int(sums[0]), int(sums[1]) % UINT64

    def check(self, *, epoch: int, device: torch.device | None = None) -> None:
        """Compare the sums over all ranks with the Snapshot; collective as `reduced`.

        Raises:
            TrainingError: A row was dropped, repeated or exchanged.
        """
        self.compare(*self.reduced(device), epoch=epoch)

    def compare(self, rows: int, row_id_sum: int, *, epoch: int) -> None:
        """Compare sums with the Snapshot's; raises as `check`."""
        wanted = self.snapshot
        if (rows, row_id_sum) != (wanted.rows, wanted.row_id_sum):
            raise TrainingError(
                f"epoch {epoch}: the receipt does not agree with the Snapshot of {wanted.table} version "
                f"{wanted.version}: wanted {wanted.rows:,} rows with row_id sum {wanted.row_id_sum:#018x}, seen {rows:,} "
                f"with {row_id_sum:#018x}"
            )

    def state_dict(self) -> dict[str, Any]:
        """This rank's part so far, as JSON. To go on at another world size, give one rank the sum of all parts."""
        self._add_up()
        return {"rows": self.rows, "row_id_sum": self._row_ids}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from a state."""
        self.rows, self._row_ids, self._waiting = int(state["rows"]), int(state["row_id_sum"]) % UINT64, []

    def _add_up(self) -> None:
        if self._waiting:
            row_ids = int(torch.cat(self._waiting).sum())
            self._row_ids = (self._row_ids + row_ids) % UINT64
            self._waiting = []


def _signed(value: int) -> int:
    return value - UINT64 if value >= UINT64 // 2 else value
