"""Another server than the chief: it holds the part of the parameters that the chief gives it, and moves them."""

import threading
import time
from typing import Any

import torch

from pipelines.config.strategies import ParameterServer
from pipelines.models.build import build_network
from pipelines.train import checkpoint
from pipelines.train.elastic.lead import most_stale, scale
from pipelines.train.elastic.store import Store
from pipelines.train.elastic.wire import Message, Server
from pipelines.train.heartbeat import Place
from pipelines.train.job import TrainJob
from pipelines.train.optimizer import make_optimizer, make_schedule
from pipelines.train.traffic import traffic

LOOK_EVERY_S = 0.2


class PartServer:
    """Answers the chief and the workers.

    Args:
        job: What is trained.
        rank: This one.
    """

    def __init__(self, job: TrainJob, rank: int) -> None:
        assert isinstance(job.train.strategy, ParameterServer), "the others have one server"
        self._job, self._options = job, job.train.strategy
        self._held = checkpoint.held_by(build_network(job.model, job.contract))
        self._lock, self._run_id, self._ticks = threading.Lock(), "", 0
        self._store: Store | None = None
        self._epoch, self._done = 0, set[tuple[int, int]]()  # of the epoch, by group and part
        self._steps, self._noted = 0, 0  # global batches of an epoch; parts that were noted before it was loaded
        answers = {
            "load": ({"server"}, self._load),
            "state": ({"server"}, self._state),
            "pull": ({"worker"}, self._pull),
            "push": ({"worker"}, self._push),
        }
        self._server = Server(job.folder, rank, answers)

    def serve(self) -> None:
        """Until the run is over."""
        while not self._job.result_path.is_file():
            time.sleep(LOOK_EVERY_S)
        self._server.close()

    def place(self) -> Place:
        """What it is at."""
        return Place(phase="communication", epoch=self._epoch, step=self._step, ticks=self._ticks)

    @property
    def _step(self) -> int:
        """Global batches of the epoch that are done."""
        return (self._noted + len(self._done)) // self._job.train.data_ranks

    def _load(self, _: int, message: Message) -> Message:
        """Begin anew with what the chief gives."""
        asked, tensors = message.header, message.tensors
        weights = {name.removeprefix("model."): x for name, x in tensors.items() if name.startswith("model.")}
        state = {name: x for name, x in tensors.items() if name.startswith("optimizer.")}
        with self._lock, torch.no_grad():
            held = {name: self._held[name] for name in weights}
            for name, tensor in held.items():
                tensor.copy_(weights[name])
            optimizer = make_optimizer(self._job.train, list(held.values()))
            schedule = make_schedule(self._job.train, optimizer, total_steps=asked["steps"] * self._job.train.epochs)
            checkpoint.put_back_optimizer(state, asked["groups"], held, optimizer)
            if schedule is not None:
                schedule.load_state_dict(asked["schedule"])  # the chief's, which had not noted what is done here
            self._optimizer, self._run_id = optimizer, asked["run"]
            self._epoch, self._done = asked["epoch"], set(map(tuple, asked["done"]))
            self._steps, self._noted = asked["steps"], asked["noted"]
            self._store = Store(held, optimizer, schedule, self._job.train.clip_grad_norm)
            self._store.schedule_to(self._epoch * self._steps + self._step)
        return Message({"traffic": traffic()})

    def _state(self, _: int, message: Message) -> Message:
        with self._lock:
            known = {"run": self._run_id, "traffic": traffic()}
            if not message.header["wanted"] or self._store is None:
                return Message(known)
            held = self._store.held
            found = checkpoint.model_tensors(held) | checkpoint.optimizer_tensors(held, self._optimizer)
            tensors = {name: tensor.clone() for name, tensor in found.items()}
            return Message(known | {"epoch": self._epoch, "done": sorted(self._done)}, tensors)

    def _pull(self, _: int, message: Message) -> Message:
        with self._lock:
            return self._answer("taken", message.header)

    def _push(self, _: int, message: Message) -> Message:
        """Learn from a part, once: who does it again, since the chief refused it or another did it too, learns nothing."""
        asked = message.header
        epoch, part = asked["epoch"], (asked["group"], asked["part"])
        with self._lock:
            if self._store is None or asked["run"] != self._run_id or epoch < self._epoch:
                return Message({"state": "lost"})
            if epoch > self._epoch:
                self._epoch, self._done, self._noted = epoch, set(), 0
            if part in self._done:
                return self._answer("taken", asked)
            staleness = self._store.version - asked["version"]
            if staleness > most_stale(self._options, self._job.train.ranks):
                return self._answer("stale", asked)
            self._store.update(message.tensors, scale=scale(self._options, staleness), norm=asked["norm"])
            self._done.add(part)
            self._store.schedule_to(self._epoch * self._steps + self._step)
            self._ticks += 1
            return self._answer("taken", asked)

    def _answer(self, state: str, asked: dict[str, Any]) -> Message:
        """With the weights, unless the caller has them."""
        if self._store is None or asked["run"] != self._run_id:
            return Message({"state": "lost"})
        header = {"state": state, "version": self._store.version}
        return Message(header, {} if asked.get("version") == self._store.version else self._store.weights())
