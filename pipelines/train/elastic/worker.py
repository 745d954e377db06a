"""A rank that takes leases on parts of an epoch and sends what it learns from them to the servers."""

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipelines.config.strategies import num_servers
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


class Worker(Trainer):
    """Computes gradients. `dist` is initialized, of this process alone.

    Args:
        job: What is trained.
        device: Where this rank computes.
        rank: This one.
    """

    def __init__(self, job: TrainJob, device: torch.device, rank: int) -> None:
        super().__init__(job, device)
        self.rank = rank
        self._servers = [Peer(job.folder, rank, server) for server in range(num_servers(job.train.strategy))]
        self._versions = [-1] * len(self._servers)
        self._names: list[list[str]] = [[] for _ in self._servers]  # what each server holds
        self._run_id, self._epoch_begun = "", -1
        self._began = (dict(self.loader.times.seconds), traffic())

    def work(self) -> None:
        """Until the chief says that it is over.

        Raises:
            TrainingError: A server was not there for `train.timeout_s`.
        """
        self.strategy.settle()
        while True:
            self.clock.enter("communication")
            answer = self._call(0, "lease", {"run": self._run_id, "version": self._versions[0]})
            if answer is None or answer.header["state"] == "over":
                return
            if answer.header["state"] == "wait":
                time.sleep(WAIT_S)
                continue
            if answer.header["run"] != self._run_id:
                self._run_id, self._versions = answer.header["run"], [-1] * len(self._servers)
            self._take_weights(0, answer)
            if all(self._pull(server) for server in range(1, len(self._servers))):
                self._do(Lease.model_validate(answer.header["lease"]))
            else:
                time.sleep(WAIT_S)  # a server came back empty; the chief sees to it

    def _do(self, lease: Lease) -> None:
        self._turn_to(lease)
        end = lease.end
        for batch in self.loader:
            if batch.step >= end:
                return
            self.clock.step = batch.step
            found = self._train_on(batch, lease)
            if found is None:
                return
            end = found
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

    def _train_on(self, batch: Batch, lease: Lease) -> int | None:
        """Where the lease ends by now; None where it was lost."""
        while True:
            told = {"rows": batch.rows, "row_id_sum": 0, "loss": 0.0, "score": 0.0}
            tensors: dict[str, Tensor] = {}
            if batch.rows:
                told, tensors = self._learn(batch)
            self.clock.enter("communication")
            for server in reversed(range(len(self._servers))):  # the chief, who notes the rows, comes last
                state, end = self._push(server, batch, lease, told, tensors)
                if state == "lost":
                    return None
                if state == "stale":
                    break  # and once more, with the weights that came back
            else:
                return end

    def _learn(self, batch: Batch) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the rows add up to; the gradient of their mean loss, and buffers, by name."""
        self.clock.enter("copy")
        on_device = self._on_device(batch)
        found = self.strategy.step(replace(batch, global_rows=batch.rows), on_device)
        self.clock.enter("other")
        assert found is not None, "there are rows"
        outputs, loss = found
        score = row_scores(outputs.detach(), on_device[self.contract.target], self.judged).sum() if self.judged else 0.0
        told = {
            "rows": batch.rows,
            "row_id_sum": int(batch.tensors[ROW_ID].sum()) % UINT64,
            "loss": float(loss.detach()),
            "score": float(score),
        }
        held = self.strategy.held()
        tensors = {name: tensor.grad if tensor.requires_grad else tensor for name, tensor in held.items()}
        return told, {name: tensor.detach().cpu() for name, tensor in tensors.items() if tensor is not None}

    def _push(
        self, server: int, batch: Batch, lease: Lease, told: dict[str, Any], tensors: dict[str, Tensor]
    ) -> tuple[str, int]:
        header = {"run": self._run_id, "version": self._versions[server], **told}
        if server == 0:
            header |= {"number": lease.number, "epoch": lease.epoch, "part": batch.step, "times": self._told_times()}
        mine = {name: tensors[name] for name in self._names[server] if name in tensors}
        answer = self._call(server, "push", header, mine)
        if answer is None or answer.header["state"] == "lost":
            return "lost", 0
        self._take_weights(server, answer)
        return answer.header["state"], answer.header.get("end", 0)

    def _told_times(self) -> dict[str, Any]:
        loader, before = self._began
        loader = {part: seconds - loader.get(part, 0.0) for part, seconds in self.loader.times.seconds.items()}
        return RankTimes.of(self.clock.seconds, loader, traffic().since(before)).model_dump()

    def _pull(self, server: int) -> bool:
        answer = self._call(server, "pull", {"run": self._run_id, "version": self._versions[server]})
        if answer is None or answer.header["state"] == "lost":
            return False
        self._take_weights(server, answer)
        return True

    @torch.no_grad()
    def _take_weights(self, server: int, answer: Message) -> None:
        self._versions[server] = answer.header["version"]
        if answer.tensors:
            held = self.strategy.held()
            self._names[server] = list(answer.tensors)
            for name, tensor in answer.tensors.items():
                held[name].copy_(tensor)

    def _call(
        self, server: int, method: str, header: dict[str, Any], tensors: dict[str, Tensor] | None = None
    ) -> Message | None:
        """The answer; None where the run is over."""
        try:
            return self._servers[server].call(method, Message(header, tensors or {}), patience_s=self.train.timeout_s)
        except TrainingError:
            if self.job.result_path.is_file():
                return None
            raise
