"""The chief as the first of the servers: it holds parameters, or its part of them, and takes gradients with the notes.

Asynchronous updates: J. Dean et al., Large scale distributed deep networks, NeurIPS 2012. Servers that hold a part each:
M. Li et al., Scaling distributed machine learning with the parameter server, OSDI 2014. Gradients by their staleness:
W. Zhang et al., Staleness-aware async-SGD, IJCAI 2016. The first gradients of a step, and backup workers: J. Chen et
al., Revisiting distributed synchronous SGD, 2016.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipelines.config.strategies import BackupWorkers, ParameterServer, num_servers
from pipelines.errors import ConfigError
from pipelines.train import checkpoint
from pipelines.train.diagnosis import RankTimes
from pipelines.train.elastic.chief import Chief, LostWeights
from pipelines.train.elastic.ledger import Ledger
from pipelines.train.elastic.store import Store, names_by_server
from pipelines.train.elastic.wire import Message, Peer
from pipelines.train.job import TrainJob
from pipelines.train.traffic import Traffic


@dataclass
class _Exchange:
    """What an epoch's updates are like."""

    updates: int = 0
    refused: int = 0
    staleness: int = 0
    most_stale: int = 0
    gathered: list[tuple[Mapping[str, Tensor], int]] = field(default_factory=list)  # of the step under way, with rows

    def figures(self) -> dict[str, float]:
        """As EpochResult has them."""
        return {
            "updates": self.updates,
            "refused": self.refused,
            "staleness_mean": self.staleness / max(self.updates, 1),
            "staleness_max": self.most_stale,
        }


class LeadServer(Chief):
    """Moves parameters by the gradients that workers send."""

    def __init__(self, job: TrainJob, device: torch.device) -> None:
        super().__init__(job, device)
        options = job.train.strategy
        assert isinstance(options, ParameterServer | BackupWorkers), "of servers"
        self._options, self._exchange = options, _Exchange()
        held = self.strategy.held()
        self._names = names_by_server(held, num_servers(options))
        if len(self._names) > (most := sum(tensor.requires_grad for tensor in held.values())):
            raise ConfigError(
                f"train.strategy.servers: wanted at most {most}, one for each tensor of the network's parameters; seen "
                f"{len(self._names)}"
            )
        self._store = Store(
            {name: held[name] for name in self._names[0]}, self.optimizer, self.schedule, self.train.clip_grad_norm
        )
        self._others = {rank: Peer(job.folder, 0, rank) for rank in range(1, len(self._names))}
        self._ahead: dict[str, list[list[int]]] = {}  # by server: parts that it learned from and that are not noted
        self._traffic: dict[int, Traffic] = {}  # by server, since it began
        self._traffic_before: dict[int, Traffic] = {}  # as the epoch began

    def resume(self) -> tuple[int, int]:
        """As Trainer does; the other servers are told what they hold."""
        found = super().resume()
        ledger = (self._resumed.ledger if self._resumed else None) or {}
        groups, schedule = checkpoint.param_groups(self.optimizer), checkpoint.schedule_state(self.schedule)
        for rank, server in self._others.items():
            held = {name: self.strategy.held()[name] for name in self._names[rank]}
            tensors = checkpoint.model_tensors(held) | checkpoint.optimizer_tensors(held, self.optimizer)
            header = {
                "run": self._run_id,
                "groups": groups,
                "schedule": schedule,
                "steps": len(self.loader),
                "epoch": self.loader.epoch,
                "noted": Ledger.of(ledger).done if ledger else 0,
                "done": ledger.get("ahead", {}).get(str(rank), []),
            }
            answer = server.call("load", Message(header, tensors), patience_s=self.train.timeout_s)
            self._traffic[rank] = Traffic(*answer.header["traffic"])
        return found

    def _begin(self) -> None:
        self._exchange, self._ahead, self._traffic_before = _Exchange(), {}, dict(self._traffic)

    @property
    def _is_between_steps(self) -> bool:
        return not self._exchange.gathered

    def _look(self) -> None:
        self._gather(with_tensors=False)

    def _gather(self, *, with_tensors: bool = True) -> None:
        """Take over what the other servers hold, or only see whether they hold it."""
        held = self.strategy.held()
        for rank, server in self._others.items():
            answer = server.call("state", Message({"wanted": with_tensors}), patience_s=self.train.timeout_s)
            if answer.header["run"] != self._run_id:
                raise LostWeights
            self._traffic[rank] = Traffic(*answer.header["traffic"])
            if with_tensors and self._ledger and answer.header["epoch"] == self._ledger.epoch:
                self._ahead[str(rank)] = [part for part in answer.header["done"] if self._ledger.is_left(*part)]
            for full_name, tensor in answer.tensors.items():
                kind, _, name = full_name.partition(".")
                if kind == "model":
                    held[name].data.copy_(tensor)
                else:
                    name, _, key = name.rpartition(".")
                    self.optimizer.state[held[name]][key] = tensor

    def _ledger_state(self) -> dict[str, Any] | None:
        state = super()._ledger_state()
        return state | {"ahead": self._ahead} if state else None

    def _rank_times(self, mine: RankTimes) -> list[RankTimes]:
        ranks = super()._rank_times(mine)
        for rank, total in self._traffic.items():
            sent, received = total.since(self._traffic_before[rank])
            ranks[rank] = ranks[rank].model_copy(update={"sent_bytes": sent, "received_bytes": received})
        return ranks

    def _verdict(self, ranks: list[RankTimes]) -> str:
        figures = self._exchange.figures()
        return (
            f"{figures['updates']:,.0f} updates, {figures['staleness_mean']:.1f} old on average and at most "
            f"{figures['staleness_max']:.0f}, {figures['refused']:,.0f} refused as too old; {self._waits(ranks)}"
        )

    def _exchange_figures(self) -> dict[str, float]:
        return self._exchange.figures() | super()._exchange_figures()

    def _accepts(self, asked: Mapping[str, Any]) -> bool:
        is_fresh = not asked["rows"] or self._store.version - asked["version"] <= self._most_stale
        self._exchange.refused += not is_fresh
        return is_fresh

    def _take(self, message: Message, *, is_last: bool) -> None:
        asked = message.header
        if isinstance(self._options, ParameterServer):
            self._update(message.tensors, self._store.version - asked["version"], asked["rows"], norm=asked["norm"])
        else:
            self._gather_step(message.tensors, asked["rows"], is_last=is_last)
        self._store.schedule_to(self._steps_done)

    @property
    def _most_stale(self) -> int:
        if isinstance(self._options, BackupWorkers):
            return 0
        return most_stale(self._options, self.train.ranks)

    def _update(self, gradients: Mapping[str, Tensor], staleness: int, rows: int, *, norm: float | None = None) -> None:
        if rows:
            self._store.update(gradients, scale=scale(self._options, staleness), norm=norm)
            exchange = self._exchange
            exchange.updates, exchange.staleness = exchange.updates + 1, exchange.staleness + staleness
            exchange.most_stale = max(exchange.most_stale, staleness)

    def _gather_step(self, gradients: Mapping[str, Tensor], rows: int, *, is_last: bool) -> None:
        """The first gradients are a step, as many as make a global batch; behind the epoch's last part what there is."""
        gathered = self._exchange.gathered
        if rows:
            gathered.append((gradients, rows))
        if gathered and (is_last or len(gathered) == self.train.data_ranks):
            total = sum(num for _, num in gathered)
            mean: dict[str, Tensor] = {}
            for part, num in gathered:  # a network may leave parameters without a gradient for some rows
                for name, tensor in part.items():
                    if not tensor.is_floating_point():
                        mean.setdefault(name, tensor)
                    elif name in mean:
                        mean[name] = mean[name] + tensor * (num / total)
                    else:
                        mean[name] = tensor * (num / total)
            self._exchange.gathered = []
            self._update(mean, 0, total)

    def _answer(self, header: dict[str, Any], message: Message) -> Message:
        """With the weights, unless the caller has them."""
        asked, store = message.header, self._store
        is_current = (asked.get("run"), asked.get("version")) == (self._run_id, store.version)
        answer = super()._answer(header | {"version": store.version}, message)
        return answer if is_current else answer._replace(tensors=store.weights())


def most_stale(options: ParameterServer, ranks: int) -> int:
    """The staleness that a gradient may have."""
    return 4 * (ranks - options.servers) if options.max_staleness is None else options.max_staleness


def scale(options: ParameterServer | BackupWorkers, staleness: int) -> float:
    """What a gradient counts."""
    return 1.0 / max(1, staleness) if isinstance(options, ParameterServer) and options.scale else 1.0
