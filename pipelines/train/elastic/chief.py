"""Rank 0 of ranks that no collective joins: it keeps the book of rows, validates and leaves checkpoints."""

import os
import struct
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pipelines.config.strategies import num_servers
from pipelines.lake import UINT64
from pipelines.train.diagnosis import RankTimes
from pipelines.train.elastic.ledger import Ledger
from pipelines.train.elastic.wire import Message, Server
from pipelines.train.job import EpochResult, TrainJob
from pipelines.train.loop import ProgressFile, Trainer
from pipelines.train.tally import Sums

LOOK_EVERY_S = 0.2


class LostWeights(Exception):
    """Who held weights came back without them: all go back to the last checkpoint."""


class Chief(Trainer, ABC):
    """Gives out parts of an epoch and notes those that are done. `dist` is initialized, of this process alone."""

    def __init__(self, job: TrainJob, device: torch.device) -> None:
        super().__init__(job, device)
        self._run_id, self._lock = uuid.uuid4().hex, threading.Condition()
        self._ledger: Ledger | None = None
        self._sums, self._is_over = Sums(), False
        self._repeated_rows = self._told_rows = 0  # of the epoch; those that its figures told
        self._times: dict[int, RankTimes] = {}
        self._journal = _Journal(job)

    def resume(self) -> tuple[int, int]:
        """As Trainer does; and workers are answered."""
        found = super().resume()
        answers = {"lease": ({"worker"}, self._lease), "note": ({"worker"}, self._note)}
        self._server = Server(self.job.folder, 0, answers)
        return found

    def run(self, on_epoch: Callable[[EpochResult], None]) -> None:
        """As Trainer does; then the workers are told that it is over."""
        super().run(on_epoch)
        with self._lock:
            self._is_over = True

    def _begin(self) -> None:
        """An epoch begins, or goes on."""

    @property
    def _is_between_steps(self) -> bool:
        """Whether all that is noted is learned, so that a checkpoint can be left."""
        return True

    @abstractmethod
    def _look(self) -> None:
        """Now and then: see whether the weights are still held.

        Raises:
            LostWeights: They are not.
        """

    @abstractmethod
    def _gather(self) -> None:
        """Have the network as it is learned by now."""

    def _accepts(self, asked: Mapping[str, Any]) -> bool:
        """Whether a part counts as done, as it was done."""
        return True

    def _take(self, message: Message, *, is_last: bool) -> None:
        """Learn from a part that is done.

        Args:
            message: The note.
            is_last: Whether it is the epoch's last.
        """

    def _pass(self, before: Sums, started: float) -> Sums:
        """Wait until every part of the epoch is noted."""
        epoch, steps, groups = self.loader.epoch, len(self.loader), self.train.data_ranks
        left = self._resumed.ledger if self._resumed and self.loader.step else None
        self._resumed = None
        progress = ProgressFile(self.job.progress_path, epoch, steps)
        self._checkpoints.start(self.loader.step, left=steps - self.loader.step)
        with self._lock:
            self._begin()
            self._times.clear()
            self._repeated_rows += self._journal.repeated(epoch, before.rows) - self._told_rows
            self._told_rows = 0
            self._journal.note(epoch, before.rows, self._repeated_rows)
            self._sums, ledger = before, Ledger.of(left) if left else Ledger(epoch, groups, steps)
            self._ledger = ledger
        seen = -1
        while not ledger.is_complete:
            with self._lock:
                self._lock.wait(LOOK_EVERY_S)
                if ledger.done != seen:  # where no worker gets on, the chief does not either
                    self.clock.enter("communication")
                seen = ledger.done
                step = min(seen // groups, steps - 1)
                if step > self.loader.step and self._is_between_steps:
                    self.loader.step = self.clock.step = step
                    if self._checkpoints.is_due(step):
                        self._save(self._sums, time.perf_counter() - started)
            progress.show(seen // groups, self._sums.mean_loss)
            self._look()
        self._gather()
        self.loader.epoch, self.loader.step = epoch + 1, 0
        self.clock.enter("other")
        return self._sums

    def _save(self, sums: Sums, seconds: float) -> None:
        if self.loader.step:  # behind an epoch it is gathered, and validated
            self._gather()
        super()._save(sums, seconds)

    def _ledger_state(self) -> dict[str, Any] | None:
        return self._ledger.state() if self._ledger and self.loader.step else None

    def _exchange_figures(self) -> dict[str, float]:
        self._told_rows = self._repeated_rows  # what is noted too late for them is the next epoch's
        return {"repeated_rows": self._told_rows}

    def _waits(self, ranks: list[RankTimes]) -> str:
        busiest = max(ranks[num_servers(self.train.strategy) :], key=lambda times: times.busy)
        return (
            f"the busiest worker waits {busiest.share('communication'):.0%} for others and {busiest.share('data'):.0%} for "
            "data"
        )

    def _rank_times(self, mine: RankTimes) -> list[RankTimes]:
        """Those that the workers told last."""
        idle = mine.with_numbers([0.0] * len(mine.numbers()))
        return [mine, *(self._times.get(rank, idle) for rank in range(1, self.train.ranks))]

    def _lease(self, rank: int, message: Message) -> Message:
        """Parts for a worker."""
        with self._lock:
            if self._is_over:
                return Message({"state": "over"})
            lease = self._ledger.lease(rank) if self._ledger else None
            if lease is None:
                return Message({"state": "wait"})
            return self._answer({"state": "work", "lease": lease.model_dump()}, message)

    def _note(self, rank: int, message: Message) -> Message:
        """Take a part that is done, or say why not: its range moved on or its run is over (`lost`), or it is `stale`."""
        asked = message.header
        with self._lock:
            self._times[rank] = RankTimes.model_validate(asked["times"])
            ledger, number, part = self._ledger, asked["number"], asked["part"]
            is_known = asked["run"] == self._run_id and ledger is not None and asked["epoch"] == ledger.epoch
            if not is_known or ledger is None or not ledger.is_wanted(number, part):
                return Message({"state": "lost"})
            if not self._accepts(asked):
                return self._answer({"state": "stale"}, message)
            ledger.note(number, part)
            self._count(asked)
            self._take(message, is_last=ledger.is_complete)
            self._lock.notify_all()
            return self._answer({"state": "taken", "end": ledger.end_of(number)}, message)

    def _repeat(self, rows: int) -> None:
        """Rows were learned that another had noted."""
        self._repeated_rows += rows
        if self._ledger is not None:
            self._journal.note(self._ledger.epoch, self._sums.rows, self._repeated_rows)

    @property
    def _steps_done(self) -> int:
        """Global batches of the run that are noted."""
        assert self._ledger is not None, "there is an epoch"
        return self._ledger.epoch * self._ledger.steps + self._ledger.done // self._ledger.groups

    def _answer(self, header: dict[str, Any], message: Message) -> Message:
        return Message(header | {"run": self._run_id})

    def _count(self, asked: Mapping[str, Any]) -> None:
        sums = self._sums
        self._sums = Sums(
            rows=sums.rows + asked["rows"],
            row_id_sum=(sums.row_id_sum + asked["row_id_sum"]) % UINT64,
            loss=sums.loss + asked["loss"],
            score=sums.score + asked["score"],
        )
        self._journal.note(asked["epoch"], self._sums.rows, self._repeated_rows)


class _Journal:
    """How many rows of which epoch are noted, and how many repeated, by the file that outlives a killed chief."""

    _FORMAT = struct.Struct("<qqq")

    def __init__(self, job: TrainJob) -> None:
        self._file = os.open(job.folder / "noted", os.O_RDWR | os.O_CREAT, 0o644)

    def note(self, epoch: int, rows: int, repeated: int) -> None:
        """So many by now."""
        os.pwrite(self._file, self._FORMAT.pack(epoch, rows, repeated), 0)

    def repeated(self, epoch: int, rows: int) -> int:
        """Rows of the epoch that are trained on again: those so far, and those noted beyond what a checkpoint has."""
        content = os.pread(self._file, self._FORMAT.size, 0)
        if len(content) < self._FORMAT.size:
            return 0
        noted_epoch, noted, repeated = self._FORMAT.unpack(content)
        return int(repeated + max(0, noted - rows)) if noted_epoch == epoch else 0
