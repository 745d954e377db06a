"""A worker that computes gradients for servers, which hold the parameters."""

import statistics
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.config.strategies import num_servers
from pipelines.stream import Batch
from pipelines.train.diagnosis import RankTimes
from pipelines.train.elastic.ledger import Lease
from pipelines.train.elastic.wire import Message, Peer
from pipelines.train.elastic.worker import Worker
from pipelines.train.heartbeat import Place
from pipelines.train.job import TrainJob


class Client(Worker):
    """Pulls weights and pushes gradients; what it pushes to the chief is noted there."""

    def __init__(self, job: TrainJob, device: torch.device, rank: int) -> None:
        super().__init__(job, device, rank)
        others = [Peer(job.folder, rank, server) for server in range(1, num_servers(job.train.strategy))]
        self._servers = [self._chief, *others]
        self._versions = [-1] * len(self._servers)
        self._names: list[list[str]] = [[] for _ in self._servers]  # what each server holds
        self._stale: list[int] = []  # updates that each of the epoch's gradients was behind, as the chief counts

    def place(self) -> Place:
        """As Trainer says, and how old its gradients are."""
        return super().place().model_copy(update={"staleness": self._staleness})

    @property
    def _staleness(self) -> float | None:
        stale = self._stale  # the heartbeat's thread asks, too
        return statistics.fmean(stale) if stale else None

    def _turn_to(self, lease: Lease) -> None:
        if lease.epoch != self._epoch_begun:
            self._stale = []
        super()._turn_to(lease)

    def _told_times(self) -> RankTimes:
        return super()._told_times().model_copy(update={"staleness": self._staleness})

    def _told(self) -> dict[str, Any]:
        return {"version": self._versions[0]}

    def _take_in(self, answer: Message) -> None:
        if answer.header["run"] != self._run_id:
            self._versions = [-1] * len(self._servers)
        self._take_weights(0, answer)

    def _is_ready(self) -> bool:
        """A server that came back empty is not; the chief sees to it."""
        return all(self._moved(server, "pull", {}, {}) == "taken" for server in range(1, len(self._servers)))

    def _train_on(self, batch: Batch, lease: Lease) -> int:
        while True:
            learned = self._learn(batch)
            gradients = self._gradients() if batch.rows else {}
            norm = self._norm() if self.train.clip_grad_norm and batch.rows else None
            self.clock.enter("communication")
            asked = {"epoch": lease.epoch, "group": lease.group, "part": batch.step, "norm": norm}
            for server in reversed(range(1, len(self._servers))) if batch.rows else ():
                state, end = self._moved(server, "push", asked, self._mine(server, gradients)), 0
                if state != "taken":
                    break
            else:  # the chief, who notes the rows, comes last
                entry, taken = self._entry(batch, lease, learned) | {"norm": norm}, self._versions[0]
                state, end = self._note(entry, self._mine(0, gradients))
                if state == "taken" and batch.rows:
                    self._stale.append(max(0, self._versions[0] - taken - 1))
            if state != "stale":  # else once more, with the weights that came back
                return end

    def _gradients(self) -> dict[str, Tensor]:
        """By name; and buffers."""
        tensors = {name: x.grad if x.requires_grad else x for name, x in self.strategy.held().items()}
        return {name: tensor.detach().cpu() for name, tensor in tensors.items() if tensor is not None}

    def _norm(self) -> float:
        found = [parameter.grad for parameter in self.strategy.parameters if parameter.grad is not None]
        return float(nn.utils.get_total_norm(found))

    def _mine(self, server: int, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: gradients[name] for name in self._names[server] if name in gradients}

    def _moved(self, server: int, method: str, asked: dict[str, Any], tensors: dict[str, Tensor]) -> str:
        """What another server than the chief says; it may answer with weights."""
        header = {"run": self._run_id, "version": self._versions[server]}
        answer = self._call(self._servers[server], method, header | asked, tensors)
        if answer is None or answer.header["state"] == "lost":
            return "lost"
        self._take_weights(server, answer)
        return str(answer.header["state"])

    @torch.no_grad()
    def _take_weights(self, server: int, answer: Message) -> None:
        self._versions[server] = answer.header["version"]
        if answer.tensors:
            held = self.strategy.held()
            self._names[server] = list(answer.tensors)
            for name, tensor in answer.tensors.items():
                held[name].copy_(tensor)
