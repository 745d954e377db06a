"""Rank 0 of ranks that no collective joins: it keeps the book of rows, holds parameters, validates and leaves checkpoints.

Asynchronous updates: J. Dean et al., Large scale distributed deep networks, NeurIPS 2012. Servers that hold a part each:
M. Li et al., Scaling distributed machine learning with the parameter server, OSDI 2014. Gradients by their staleness:
W. Zhang et al., Staleness-aware async-SGD, IJCAI 2016. The first gradients of a step, and backup workers: J. Chen et
al., Revisiting distributed synchronous SGD, 2016.
"""

import os
import struct
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipelines.config.strategies import BackupWorkers, ParameterServer, num_servers
from pipelines.lake import UINT64
from pipelines.train import checkpoint
from pipelines.train.diagnosis import RankTimes
from pipelines.train.elastic.ledger import Ledger
from pipelines.train.elastic.store import Store, names_by_server
from pipelines.train.elastic.wire import Message, Peer, Server
from pipelines.train.job import EpochResult, TrainJob
from pipelines.train.loop import ProgressFile, Trainer
from pipelines.train.tally import Sums

LOOK_EVERY_S = 0.2


class ServerGone(Exception):
    """Another server came back empty: all go back to the last checkpoint."""


@dataclass
class _Exchange:
    """What an epoch's updates are like."""

    updates: int = 0
    refused: int = 0
    staleness: int = 0
    most_stale: int = 0
    repeated_rows: int = 0
    gathered: list[tuple[Mapping[str, Tensor], int]] = field(default_factory=list)  # of the step under way, with rows

    def figures(self) -> dict[str, float]:
        """As EpochResult has them."""
        return {
            "updates": self.updates,
            "refused": self.refused,
            "staleness_mean": self.staleness / max(self.updates, 1),
            "staleness_max": self.most_stale,
            "repeated_rows": self.repeated_rows,
        }


class Chief(Trainer):
    """Trains by what workers send. `dist` is initialized, of this process alone."""

    def __init__(self, job: TrainJob, device: torch.device) -> None:
        super().__init__(job, device)
        options = job.train.strategy
        assert isinstance(options, ParameterServer | BackupWorkers), "of an elastic strategy"
        self._options, self._run_id, self._lock = options, uuid.uuid4().hex, threading.Condition()
        held = self.strategy.held()
        self._names = names_by_server(held, num_servers(options))
        self._store = Store(
            {name: held[name] for name in self._names[0]}, self.optimizer, self.schedule, self.train.clip_grad_norm
        )
        self._others = {rank: Peer(job.folder, 0, rank) for rank in range(1, len(self._names))}
        self._ledger: Ledger | None = None
        self._sums, self._exchange, self._is_over = Sums(), _Exchange(), False
        self._times: dict[int, RankTimes] = {}
        self._journal = _Journal(job)

    def resume(self) -> tuple[int, int]:
        """As Trainer does; the other servers are told what they hold, and workers are answered."""
        found = super().resume()
        groups, schedule = checkpoint.param_groups(self.optimizer), checkpoint.schedule_state(self.schedule)
        for rank, server in self._others.items():
            held = {name: self.strategy.held()[name] for name in self._names[rank]}
            tensors = checkpoint.model_tensors(held) | checkpoint.optimizer_tensors(held, self.optimizer)
            header = {"run": self._run_id, "groups": groups, "schedule": schedule}
            server.call("load", Message(header, tensors), patience_s=self.train.timeout_s)
        answers = {"lease": ({"worker"}, self._lease), "push": ({"worker"}, self._push)}
        self._server = Server(self.job.folder, 0, answers)
        return found

    def run(self, on_epoch: Callable[[EpochResult], None]) -> None:
        """As Trainer does; then the workers are told that it is over."""
        super().run(on_epoch)
        with self._lock:
            self._is_over = True

    def _pass(self, before: Sums, started: float) -> Sums:
        """Wait until every part of the epoch is noted."""
        epoch, steps, groups = self.loader.epoch, len(self.loader), self.train.data_ranks
        left = self._resumed.ledger if self._resumed and self.loader.step else None
        self._resumed = None
        progress = ProgressFile(self.job.progress_path, epoch, steps)
        self._checkpoints.start(self.loader.step)
        with self._lock:
            self._exchange = _Exchange(repeated_rows=self._journal.lost(epoch, before.rows))
            self._sums, ledger = before, Ledger.of(left) if left else Ledger(epoch, groups, steps)
            self._ledger = ledger
        seen = -1
        while not ledger.is_complete:
            self.clock.enter("communication")
            with self._lock:
                self._lock.wait(LOOK_EVERY_S)
                self.clock.ticks -= ledger.done == seen  # where no worker gets on, the chief does not either
                seen = ledger.done
                step = min(seen // groups, steps - 1)
                if step > self.loader.step and not self._exchange.gathered:
                    self.loader.step = self.clock.step = step
                    if self._checkpoints.is_due(step):
                        self._save(self._sums, time.perf_counter() - started)
            progress.show(seen // groups, self._sums.mean_loss)
            self._gather(with_tensors=False)
        self._gather()
        self.loader.epoch, self.loader.step = epoch + 1, 0
        self.clock.enter("other")
        return self._sums

    def _gather(self, *, with_tensors: bool = True) -> None:
        """Take over what the other servers hold, or only see whether they hold it."""
        held = self.strategy.held()
        for server in self._others.values():
            answer = server.call("state", Message({"wanted": with_tensors}), patience_s=self.train.timeout_s)
            if answer.header["run"] != self._run_id:
                raise ServerGone
            for full_name, tensor in answer.tensors.items():
                kind, _, name = full_name.partition(".")
                if kind == "model":
                    held[name].data.copy_(tensor)
                else:
                    name, _, key = name.rpartition(".")
                    self.optimizer.state[held[name]][key] = tensor

    def _save(self, sums: Sums, seconds: float) -> None:
        self._gather()
        super()._save(sums, seconds)

    def _ledger_state(self) -> dict[str, Any] | None:
        return self._ledger.state() if self._ledger and self.loader.step else None

    def _verdict(self, ranks: list[RankTimes]) -> str:
        figures, workers = self._exchange.figures(), ranks[len(self._names) :]
        busiest = max(workers, key=lambda times: times.busy)
        return (
            f"{figures['updates']:,.0f} updates, {figures['staleness_mean']:.1f} old on average and at most "
            f"{figures['staleness_max']:.0f}, {figures['refused']:,.0f} refused as too old; the busiest worker waits "
            f"{busiest.share('communication'):.0%} for servers and {busiest.share('data'):.0%} for data"
        )

    def _exchange_figures(self) -> dict[str, float]:
        return self._exchange.figures()

    def _rank_times(self, mine: RankTimes) -> list[RankTimes]:
        """Those that the workers told last."""
        idle = mine.with_numbers([0.0] * len(mine.numbers()))
        return [mine, *(self._times.get(rank, idle) for rank in range(1, self.train.ranks))]

    def _lease(self, rank: int, message: Message) -> Message:
        """Parts for a worker, and the weights if they changed since it had them."""
        with self._lock:
            if self._is_over:
                return Message({"state": "over"})
            lease = self._ledger.lease(rank) if self._ledger else None
            if lease is None:
                return Message({"state": "wait"})
            return self._with_weights({"state": "work", "lease": lease.model_dump()}, message)

    def _push(self, rank: int, message: Message) -> Message:
        """Take a part's gradient, or say why not: its range moved on or its run is over (`lost`), or it is `stale`."""
        asked = message.header
        with self._lock:
            self._times[rank] = RankTimes.model_validate(asked["times"])
            ledger, number, part = self._ledger, asked["number"], asked["part"]
            is_known = asked["run"] == self._run_id and ledger is not None and asked["epoch"] == ledger.epoch
            if not is_known or ledger is None or not ledger.is_wanted(number, part):
                return Message({"state": "lost"})
            staleness = self._store.version - asked["version"]
            if asked["rows"] and staleness > self._most_stale:
                self._exchange.refused += 1
                return self._with_weights({"state": "stale"}, message)
            ledger.note(number, part)
            self._count(asked)
            if isinstance(self._options, ParameterServer):
                self._update(message.tensors, staleness, asked["rows"])
            else:
                self._gather_step(message.tensors, asked["rows"], is_last=ledger.is_complete)
            self._lock.notify_all()
            return self._with_weights({"state": "taken", "end": ledger.end_of(number)}, message)

    @property
    def _most_stale(self) -> int:
        if isinstance(self._options, BackupWorkers):
            return 0
        return most_stale(self._options, self.train.ranks)

    def _update(self, gradients: Mapping[str, Tensor], staleness: int, rows: int) -> None:
        if rows:
            self._store.update(gradients, scale=scale(self._options, staleness))
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
            shares = [num / total for _, num in gathered]
            mean = {
                name: torch.stack([part[name] * share for (part, _), share in zip(gathered, shares, strict=True)]).sum(
                    0
                )
                for name in gathered[0][0]
            }
            self._exchange.gathered = []
            self._update(mean, 0, total)

    def _count(self, asked: Mapping[str, Any]) -> None:
        sums = self._sums
        self._sums = Sums(
            rows=sums.rows + asked["rows"],
            row_id_sum=(sums.row_id_sum + asked["row_id_sum"]) % UINT64,
            loss=sums.loss + asked["loss"],
            score=sums.score + asked["score"],
        )
        self._journal.note(asked["epoch"], self._sums.rows)

    def _with_weights(self, header: dict[str, Any], message: Message) -> Message:
        """An answer with the weights, unless the caller has them."""
        asked, store = message.header, self._store
        is_current = (asked.get("run"), asked.get("version")) == (self._run_id, store.version)
        return Message(header | {"run": self._run_id, "version": store.version}, {} if is_current else store.weights())


def most_stale(options: ParameterServer, ranks: int) -> int:
    """The staleness that a gradient may have."""
    return 4 * (ranks - options.servers) if options.max_staleness is None else options.max_staleness


def scale(options: ParameterServer | BackupWorkers, staleness: int) -> float:
    """What a gradient counts."""
    return 1.0 / max(1, staleness) if isinstance(options, ParameterServer) and options.scale else 1.0


class _Journal:
    """How many rows of which epoch are noted, by the file that outlives a killed chief."""

    _FORMAT = struct.Struct("<qq")

    def __init__(self, job: TrainJob) -> None:
        self._file = os.open(job.folder / "noted", os.O_RDWR | os.O_CREAT, 0o644)

    def note(self, epoch: int, rows: int) -> None:
        """So many by now."""
        os.pwrite(self._file, self._FORMAT.pack(epoch, rows), 0)

    def lost(self, epoch: int, rows: int) -> int:
        """Rows of the epoch that were noted beyond those that a checkpoint has: they are trained on again."""
        content = os.pread(self._file, self._FORMAT.size, 0)
        if len(content) < self._FORMAT.size:
            return 0
        noted_epoch, noted = self._FORMAT.unpack(content)
        return max(0, noted - rows) if noted_epoch == epoch else 0
