"""Peers that train a network each and average them by push-sum (`pushsum.py`), while the chief only keeps the book.

Stochastic gradient push: M. Assran et al., Stochastic gradient push for distributed deep learning, ICML 2019. Gradients
are taken at z, and what the optimizer moves is added to w z, so that each step moves the average alike, whatever weight
its peer has at that time.
"""

import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from pipelines.config.strategies import Gossip
from pipelines.errors import TrainingError
from pipelines.stream import Batch
from pipelines.train import checkpoint
from pipelines.train.diagnosis import RankTimes
from pipelines.train.elastic.chief import LOOK_EVERY_S, Chief, LostWeights
from pipelines.train.elastic.ledger import Lease
from pipelines.train.elastic.pushsum import Parcel, PushSum, copied
from pipelines.train.elastic.wire import Message, Peer, Server
from pipelines.train.elastic.worker import Worker
from pipelines.train.job import TrainJob
from pipelines.train.loop import Trainer

ANSWER_S = 10.0  # in which a peer pauses its sends, or is silent
LATE_S = 5.0  # at an epoch's end, for what peers have to note
NOTED_AT_ONCE = 8  # parts of a peer, at most
SEND_S, SEND_BYTES_PER_S = 5.0, 1e6  # what takes longer than that much and its size at that rate has failed
FATES = ("sent", "refused", "failed", "skipped")  # of a peer's sends


class GossipChief(Chief):
    """Takes the average of all peers as the network where an epoch ends, and for checkpoints."""

    def __init__(self, job: TrainJob, device: torch.device) -> None:
        super().__init__(job, device)
        self._peers = {rank: Peer(job.folder, 0, rank) for rank in range(1, job.train.ranks)}
        self._sends, self._error, self._weight = Counter[str](), 0.0, 0.0
        self._silent: set[int] = set()  # peers that did not answer, until they call again
        self._busy: set[int] = set()  # peers that have work, and may have to note what they learned
        self._has_noted = self._is_lost = False
        self._gathers = 0

    def _begin(self) -> None:
        self._sends = Counter()
        self._busy.clear()

    def _look(self) -> None:
        if self._is_lost:
            raise LostWeights

    @torch.no_grad()
    def _gather(self) -> None:
        """The network is the average by weights, with the optimizer's state of one of the peers."""
        if self._ledger and self._ledger.is_complete:
            with self._lock:  # what peers still have to note was learned twice
                self._lock.wait_for(lambda: self._busy <= self._silent, LATE_S)
        parcels = self._parcels()
        self._gathers += 1
        self._weight = sum(parcel.weight for parcel in parcels)
        held = self.strategy.held()
        for name, tensor in held.items():
            values = [parcel.tensors[f"model.{name}"] for parcel in parcels]
            shares = [parcel.weight / self._weight for parcel in parcels]
            if tensor.is_floating_point():
                values[0] = torch.stack([x * share for x, share in zip(values, shares, strict=True)]).sum(0)
            tensor.copy_(values[0])
        learned = {name: tensor.detach().cpu() for name, tensor in held.items() if tensor.requires_grad}
        apart = [_norm({name: p.tensors[f"model.{name}"] - x for name, x in learned.items()}) for p in parcels]
        self._error = sum(apart) / len(apart) / max(_norm(learned), 1e-30)

    def _parcels(self) -> list[Parcel]:
        """What the peers hold that are there, once there is one."""
        until = time.monotonic() + self.train.timeout_s
        while True:
            number = self._gathers + 1
            there = {rank: peer for rank, peer in self._peers.items() if self._paused(rank, peer, number) is not None}
            parcels: list[Parcel] = []
            for rank, peer in there.items():
                answer = _state_of(peer, self, is_whole=not parcels)
                if answer is None:
                    self._silent.add(rank)
                elif not (answer.header["is_new"] and self._has_noted):
                    if not parcels:
                        _take_over_optimizer(self, answer)
                    parcels.append(Parcel(answer.tensors, answer.header["weight"]))
            if parcels:
                return parcels
            self._look()
            if time.monotonic() > until:
                raise TrainingError(f"wanted a peer that holds the network, seen none for {self.train.timeout_s} s")
            time.sleep(LOOK_EVERY_S)

    def _paused(self, rank: int, peer: Peer, number: int) -> Message | None:
        """Have a peer pause its sends until so many gathers are done, if it is there and not stopped."""
        until = time.monotonic() + ANSWER_S
        while rank not in self._silent:
            answer = _ask_if_there(peer, "pause", {"run": self._run_id, "number": number}, ANSWER_S)
            if answer is None:
                self._silent.add(rank)
            elif answer.header["is_settled"] or time.monotonic() > until:
                return answer
        return None

    def _lease(self, rank: int, message: Message) -> Message:
        """A new peer that found no other, while parts are done: what was learned from them may be lost."""
        self._silent.discard(rank)
        is_late = self._has_noted and not self._is_over
        if is_late and message.header["is_new"] and not self._is_held_but_by(rank):
            self._is_lost = True
            return Message({"state": "wait"})
        answer = super()._lease(rank, message)
        with self._lock:
            if answer.header["state"] == "work":
                self._busy.add(rank)
            else:
                self._busy.discard(rank)
                self._lock.notify_all()
        return answer

    def _is_held_but_by(self, rank: int) -> bool:
        others = {other: Peer(self.job.folder, 0, other) for other in self._peers if other != rank}
        answers = [self._paused(other, peer, self._gathers) for other, peer in others.items()]
        return any(answer is not None and not answer.header["is_new"] for answer in answers)

    def _note(self, rank: int, message: Message) -> Message:
        """Take parts, in their order. What comes late is learned all the same, so that its rows count as repeated."""
        self._silent.discard(rank)
        for part in message.header["parts"]:
            answer = super()._note(rank, Message(message.header | part))
            with self._lock:
                self._has_noted |= answer.header["state"] == "taken"
                self._sends.update(part["sends"])
                if answer.header["state"] == "lost":
                    self._repeat(part["rows"])
        return answer

    def _answer(self, header: dict[str, Any], message: Message) -> Message:
        """With the steps of the whole run that are done, and how often all was gathered."""
        return super()._answer(header | {"steps": self._steps_done, "gathers": self._gathers}, message)

    def _verdict(self, ranks: list[RankTimes]) -> str:
        sends = self._sends
        return (
            f"{sends['sent']:,} sends, {sends['refused']:,} refused by peers that had not taken the last, "
            f"{sends['failed']:,} failed; peers are {self._error:.2%} from their mean; {self._waits(ranks)}"
        )

    def _exchange_figures(self) -> dict[str, float]:
        sends = {f"sends_{fate}": float(self._sends[fate]) for fate in FATES}
        figures = {"consensus_error": self._error, "weight": self._weight}
        return sends | figures | super()._exchange_figures()


class GossipWorker(Worker):
    """A peer: its own network and optimizer."""

    def __init__(self, job: TrainJob, device: torch.device, rank: int) -> None:
        super().__init__(job, device, rank)
        assert isinstance(job.train.strategy, Gossip)
        self._every_steps, self._steps = job.train.strategy.every_steps, 0
        peers = range(1, job.train.ranks)
        self._others = {other: Peer(job.folder, rank, other) for other in peers if other != rank}
        averaged = {name: tensor for name, tensor in self.strategy.held().items() if tensor.is_floating_point()}
        self._average = PushSum(rank, peers, averaged, self._deliver)
        self._lock = threading.Lock()  # around what changes the network
        self._paused_until = ("", 0)  # so many gathers of a run of the chief's
        self._is_new = True  # until the chief knows that this network is one of the run's
        self._book = ThreadPoolExecutor(1)  # has parts noted while the next ones are computed
        self._noting: Future[tuple[str, int]] | None = None
        self._unnoted: list[dict[str, Any]] = []  # parts whose note waits for the one under way
        self._end = 0  # of the lease, as of the last note

    def work(self) -> None:
        """Begin with what another peer holds, else with the checkpoint; then as Worker does."""
        self._join()
        answers = {
            "give": ({"worker"}, self._given),
            "pause": ({"server"}, self._pause),
            "state": ({"server", "worker"}, self._state),
        }
        server = Server(self.job.folder, self.rank, answers)
        super().work()
        self._book.shutdown()
        server.close()

    def _join(self) -> None:
        for peer in self._others.values():
            answer = _state_of(peer, self, is_whole=True)
            if answer is not None:
                with torch.no_grad():
                    for name, tensor in self.strategy.held().items():
                        tensor.copy_(answer.tensors[f"model.{name}"])
                _take_over_optimizer(self, answer)
                self._is_new = answer.header["is_new"]
                return
        self.resume()

    def _told(self) -> dict[str, Any]:
        return {"is_new": self._is_new}

    def _take_in(self, answer: Message) -> None:
        """The learning rate follows the run, not this peer's own steps, which are more where others are lost."""
        self._is_new = False
        with self._lock:
            run, gathers = self._paused_until
            if answer.header["run"] != run or answer.header["gathers"] >= gathers:
                self._average.is_paused = False
            while self.schedule is not None and self.schedule.last_epoch < answer.header["steps"]:
                self.schedule.step()

    def _do(self, lease: Lease) -> None:
        self._end = lease.end
        super()._do(lease)
        self._settle(0)

    def _train_on(self, batch: Batch, lease: Lease) -> int:
        """A note waits behind what the peers send each other, so parts that are done meanwhile go with the next."""
        learned = self._learn(batch)
        self.clock.enter("communication")
        self._settle(NOTED_AT_ONCE)
        if batch.step < self._end:
            if batch.rows:
                self._move()
            self._unnoted.append(self._entry(batch, lease, learned | {"sends": self._average.counted()}))
            self._settle(NOTED_AT_ONCE)
        return self._end

    def _settle(self, too_many: int) -> None:
        """Have parts noted; wait for the note under way only where so many parts wait behind it."""
        while self._noting is not None or self._unnoted:
            if self._noting is None:
                parts, self._unnoted = self._unnoted, []
                self._noting = self._book.submit(self._note, {"parts": parts})
            if not self._noting.done() and len(self._unnoted) < too_many:
                return
            _, self._end = self._noting.result()
            self._noting = None

    def _move(self) -> None:
        self._steps += 1
        with self._lock:
            self.clock.enter("communication")
            self._average.take()
            self.clock.enter("optimizer")
            self._optimize()
            self.clock.enter("communication")
            if self._steps % self._every_steps == 0:
                self._average.send()

    @torch.no_grad()
    def _optimize(self) -> None:
        """Move w z by the optimizer's step: z by the step over w."""
        before = [parameter.detach().clone() for parameter in self.strategy.parameters]
        self.strategy.optimize(self.optimizer)
        for parameter, was in zip(self.strategy.parameters, before, strict=True):
            parameter.copy_(was.lerp_(parameter, 1 / self._average.weight))

    def _deliver(self, rank: int, parcel: Parcel) -> bool:
        message = Message({"weight": parcel.weight}, parcel.tensors)
        answer = self._others[rank].call("give", message, patience_s=0, timeout_s=_limit_s(parcel.tensors))
        return bool(answer.header["is_taken"])

    def _given(self, sender: int, message: Message) -> Message:
        return Message({"is_taken": self._average.put(sender, Parcel(message.tensors, message.header["weight"]))})

    def _pause(self, _: int, message: Message) -> Message:
        """Send nothing until the chief gives out work again, so that what all hold can be added up."""
        with self._lock:
            run, number = message.header["run"], message.header["number"]
            before = self._paused_until[1] if self._paused_until[0] == run else 0
            self._average.is_paused, self._paused_until = True, (run, max(before, number))
        is_settled = self._average.settle(ANSWER_S / 2)
        return Message({"is_new": self._is_new, "is_settled": is_settled})

    def _state(self, _: int, message: Message) -> Message:
        """What this peer holds by now; with the optimizer's state where the `whole` is wanted."""
        with self._lock:
            held = self.strategy.held()
            mixed, weight = self._average.snapshot()
            tensors = checkpoint.model_tensors({**held, **mixed})
            header: dict[str, Any] = {"weight": weight, "is_new": self._is_new}
            if message.header["whole"]:
                tensors |= checkpoint.optimizer_tensors(held, self.optimizer)
                header["groups"] = checkpoint.param_groups(self.optimizer)
                header["schedule"] = checkpoint.schedule_state(self.schedule)
            return Message(header, {name: copied(tensor) for name, tensor in tensors.items()})


def _ask_if_there(peer: Peer, method: str, header: dict[str, Any], timeout_s: float) -> Message | None:
    """A peer's answer; None where it is not there."""
    try:
        return peer.call(method, Message(header), patience_s=0, timeout_s=timeout_s)
    except TrainingError:
        return None


def _state_of(peer: Peer, trainer: Trainer, *, is_whole: bool) -> Message | None:
    limit_s = _limit_s(trainer.strategy.held()) * (3 if is_whole else 1)  # Adam has two numbers more for each
    return _ask_if_there(peer, "state", {"whole": is_whole}, limit_s)


def _limit_s(tensors: Mapping[str, Tensor]) -> float:
    return SEND_S + sum(tensor.nbytes for tensor in tensors.values()) / SEND_BYTES_PER_S


def _take_over_optimizer(trainer: Trainer, answer: Message) -> None:
    values = {name: tensor for name, tensor in answer.tensors.items() if name.startswith("optimizer.")}
    checkpoint.put_back_optimizer(values, answer.header["groups"], trainer.strategy.held(), trainer.optimizer)
    if trainer.schedule is not None:
        trainer.schedule.load_state_dict(answer.header["schedule"])


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors.values()]).sum().sqrt())
