"""A rank that takes leases on parts of an epoch, and has the chief note what it did."""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipelines.errors import TrainingError
from pipelines.lake import ROW_ID, UINT64
from pipelines.models.build import row_scores
from pipelines.stream import Batch
from pipelines.train import generators
from pipelines.train.diagnosis import RankTimes
from pipelines.train.elastic.ledger import Lease
from pipelines.train.elastic.wire import Message, Peer
from pipelines.train.job import TrainJob
from pipelines.train.loop import Trainer
from pipelines.train.traffic import traffic

WAIT_S = 0.05  # where there is nothing to do, as while the chief validates


class Worker(Trainer, ABC):
    """Goes through the parts that it is leased. `dist` is initialized, of this process alone.

    Args:
        job: What is trained.
        device: Where this rank computes.
        rank: This one.
    """

    def __init__(self, job: TrainJob, device: torch.device, rank: int) -> None:
        super().__init__(job, device)
        self.rank = rank
        self._chief = Peer(job.folder, rank, 0)
        self._run_id, self._epoch_begun = "", -1
        self._began = (dict(self.loader.times.seconds), traffic())

    def work(self) -> None:
        """Until the chief says that it is over.

        Raises:
            TrainingError: A server was not there for `train.timeout_s`.
        """
        self.strategy.settle()
        self.clock.enter("communication")
        while True:
            answer = self._ask("lease", {})
            if answer is None or answer.header["state"] == "over":
                return
            if answer.header["state"] == "work" and self._is_ready():
                self._do(Lease.model_validate(answer.header["lease"]))
                self.clock.enter("communication")
            else:  # no tick: who waits does not get on
                time.sleep(WAIT_S)

    def _told(self) -> dict[str, Any]:
        """What the chief is told of this rank with each call."""
        return {}

    def _take_in(self, answer: Message) -> None:
        """See to what comes with the chief's answers; `_run_id` is still the one before."""

    def _is_ready(self) -> bool:
        """Whether this rank can go on."""
        return True

    @abstractmethod
    def _train_on(self, batch: Batch, lease: Lease) -> int:
        """Do a part and have it noted. Where the lease ends, as far as is known; 0 where it was lost."""

    def _do(self, lease: Lease) -> None:
        self._turn_to(lease)
        end = lease.end
        for batch in self.loader:
            if batch.step >= end:
                return
            self.clock.step = batch.step
            end = self._train_on(batch, lease)
            self.clock.enter("data")

    def _turn_to(self, lease: Lease) -> None:
        """Have the loader at the lease's first part."""
        if self._epoch_begun != lease.epoch:
            self._epoch_begun = lease.epoch
            generators.seed_epoch(self.job.seed, epoch=lease.epoch, rank=self.rank)
            self._began = (dict(self.loader.times.seconds), traffic())
            self.clock.start(lease.epoch, lease.first)
        self.network.train()
        at = (self.strategy.data_rank, self.loader.epoch, self.loader.step)
        if self.strategy.data_ranks != self.train.data_ranks or at != (lease.group, lease.epoch, lease.first):
            seconds = self.loader.times.seconds
            self.loader.close()
            self.strategy.data_rank, self.strategy.data_ranks = lease.group, self.train.data_ranks
            self.loader = self._loader(self.job.snapshot, epochs=self.train.epochs)
            self.loader.times.seconds = seconds
            self.loader.load_state_dict(self.loader.state_dict() | {"epoch": lease.epoch, "step": lease.first})
        self.clock.enter("data")

    def _learn(self, batch: Batch) -> dict[str, Any]:
        """Have the gradient of the rows' mean loss in the network. What the rows add up to."""
        if not batch.rows:
            return {"rows": 0, "row_id_sum": 0, "loss": 0.0, "score": 0.0}
        self.clock.enter("copy")
        on_device = self._on_device(batch)
        found = self.strategy.step(replace(batch, global_rows=batch.rows), on_device)
        self.clock.enter("other")
        assert found is not None, "there are rows"
        outputs, loss = found
        score = row_scores(outputs.detach(), on_device[self.contract.target], self.judged).sum() if self.judged else 0.0
        return {
            "rows": batch.rows,
            "row_id_sum": int(batch.tensors[ROW_ID].sum()) % UINT64,
            "loss": float(loss.detach()),
            "score": float(score),
        }

    def _entry(self, batch: Batch, lease: Lease, learned: dict[str, Any]) -> dict[str, Any]:
        """What the chief is told of a part."""
        entry = {
            "number": lease.number,
            "epoch": lease.epoch,
            "part": batch.step,
            "times": self._told_times().model_dump(),
        }
        return entry | learned

    def _note(self, entry: dict[str, Any], tensors: Mapping[str, Tensor] | None = None) -> tuple[str, int]:
        """Have the chief note what is done. What it says, and where the lease ends by now; 0 where it was lost."""
        answer = self._ask("note", entry, tensors)
        return ("lost", 0) if answer is None else (answer.header["state"], answer.header.get("end", 0))

    def _told_times(self) -> RankTimes:
        loader, before = self._began
        loader = {part: seconds - loader.get(part, 0.0) for part, seconds in self.loader.times.seconds.items()}
        return RankTimes.of(self.clock.seconds, loader, traffic().since(before))

    def _ask(self, method: str, header: dict[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Message | None:
        """The chief's answer; None where the run is over."""
        answer = self._call(self._chief, method, {"run": self._run_id, **self._told(), **header}, tensors)
        if answer is not None and "run" in answer.header:
            self._take_in(answer)
            self._run_id = answer.header["run"]
        return answer

    def _call(
        self, server: Peer, method: str, header: dict[str, Any], tensors: Mapping[str, Tensor] | None = None
    ) -> Message | None:
        """The answer; None where the run is over."""
        is_over, message = self.job.result_path.is_file, Message(header, tensors or {})
        try:
            return server.call(method, message, patience_s=self.train.timeout_s, is_over=is_over)
        except TrainingError:
            if is_over():
                return None
            raise
