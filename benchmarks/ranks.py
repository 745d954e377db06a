"""Training on ranks behind links: each is forked from this process, warm, into a namespace of its own."""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
import torch._dynamo  # what optimizers and DDP import when they are first used
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.nn.parallel import DistributedDataParallel

from benchmarks.links import INTERFACE, Links
from pipelines.config.strategies import Gossip
from pipelines.stream import Batch
from pipelines.stream.memory import keep_freed_memory
from pipelines.train.elastic.chief import Chief
from pipelines.train.elastic.gossip import GossipChief
from pipelines.train.elastic.lead import LeadServer
from pipelines.train.elastic.roles import chief_of, worker_of
from pipelines.train.job import EpochResult, TrainJob
from pipelines.train.loop import Trainer
from pipelines.train.tally import Tally
from pipelines.train.worker import die_with_parent

_PORT, _TIMEOUT_S = 29500, 900


class Mark(NamedTuple):
    """A moment: this rank's clock, and the bytes that all ranks have sent."""

    seconds: float
    sent: int

    @classmethod
    def now(cls, links: Links) -> "Mark":
        """Now."""
        return cls(time.perf_counter(), links.sent_bytes())


@dataclass
class Watched:
    """What a rank did.

    Attributes:
        marks: In front of the first watched step, and behind each.
        losses: Mean loss of this rank's rows so far, behind each watched step.
        buckets: Bytes of DistributedDataParallel's buckets, where it is the strategy.
        epochs: Those that it finished.
    """

    marks: list[Mark] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    buckets: list[int] = field(default_factory=list)
    epochs: list[EpochResult] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """From the first mark to the last."""
        return self.marks[-1].seconds - self.marks[0].seconds

    @property
    def sent(self) -> int:
        """Bytes of all ranks, from the first mark to the last."""
        return self.marks[-1].sent - self.marks[0].sent


class _Enough(Exception):
    """All steps that are watched are done."""


class _WatchedTrainer(Trainer):
    """Trains up to the end of `steps`, and looks at the links behind each of them."""

    def __init__(self, job: TrainJob, links: Links, steps: range) -> None:
        super().__init__(job, torch.device("cpu"))
        self.links, self.steps, self.watched = links, steps, Watched()

    def _step(self, batch: Batch, tally: Tally) -> None:
        if batch.step == self.steps.start:
            self.watched.marks.append(Mark.now(self.links))
        super()._step(batch, tally)
        if batch.step in self.steps:
            self.watched.marks.append(Mark.now(self.links))
            self.watched.losses.append(tally.mean_loss())
        if batch.step + 1 == self.steps.stop:
            raise _Enough


class _WatchedChief(Chief):
    """Takes what workers did up to the end of `steps`; a step is as many parts as there are groups of lanes."""

    def __init__(self, job: TrainJob, links: Links, steps: range) -> None:
        super().__init__(job, torch.device("cpu"))
        self.links, self.steps, self.watched, self._parts = links, steps, Watched(), 0

    def _count(self, asked: Mapping[str, Any]) -> None:
        super()._count(asked)
        self._parts += 1
        step, rest = divmod(self._parts, self.train.data_ranks)
        if not rest and step >= self.steps.start and step <= self.steps.stop:
            self.watched.marks.append(Mark.now(self.links))

    def _look(self) -> None:
        if self._parts >= self.steps.stop * self.train.data_ranks:
            raise _Enough
        super()._look()  # type: ignore[safe-super]


class _WatchedLead(_WatchedChief, LeadServer):
    pass


class _WatchedGossip(_WatchedChief, GossipChief):
    pass


def train_steps(links: Links, job: TrainJob, steps: range) -> Watched:
    """On a rank: train the first steps of an epoch, of which `steps` are watched."""
    if job.train.is_elastic:
        _work_alone(job)
        chief = _WatchedGossip if isinstance(job.train.strategy, Gossip) else _WatchedLead
        trainer: _WatchedTrainer | _WatchedChief = chief(job, links, steps)
        trainer.resume()
    else:
        trainer = _WatchedTrainer(job, links, steps)
    try:
        trainer.run(lambda _: None)
    except _Enough:
        if isinstance(network := trainer.strategy.parallel, DistributedDataParallel):
            # Those in use, whether or not they were laid out anew.
            told = network._get_ddp_logging_data()["bucket_sizes"]  # type: ignore[no-untyped-call]
            trainer.watched.buckets = [int(size) for size in told.split(",")]
        return trainer.watched
    raise ValueError(f"wanted {steps.stop} steps, the epoch has {len(trainer.loader)}")


def train_whole(links: Links, job: TrainJob) -> Watched:
    """On a rank: train all epochs; the marks stand around them."""
    if job.train.is_elastic:
        _work_alone(job)
        trainer: Trainer = chief_of(job.train.strategy)(job, torch.device("cpu"))
    else:
        trainer = Trainer(job, torch.device("cpu"))
    trainer.resume()
    watched = Watched(marks=[Mark.now(links)])
    trainer.run(watched.epochs.append)
    watched.marks.append(Mark.now(links))
    return watched


def _work_alone(job: TrainJob) -> None:
    """No collective joins the ranks from now on; all but rank 0 work for it until they are ended."""
    rank = dist.get_rank()
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    if rank:
        worker_of(job.train.strategy)(job, torch.device("cpu"), rank).work()
        signal.pause()


def sum_buckets(links: Links, buckets: list[int], repeats: int) -> Watched:
    """On a rank: nothing but the exchange of buckets of so many bytes, as DistributedDataParallel starts them."""
    tensors = [torch.zeros(size // 4) for size in buckets]
    watched = Watched(marks=[Mark.now(links)])
    for _ in range(repeats):
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()
        watched.marks.append(Mark.now(links))
    return watched


def run_ranks(
    links: Links, world: int, work: Callable[..., Any], *arguments: Any, on_loopback: bool = False, answers: int = 0
) -> list[Any]:
    """What `work(links, *arguments)` gives on each rank, each behind a link of its own or all in one namespace.

    Where not all answer, the others are ended once the first so many have.

    Raises:
        RuntimeError: A rank failed.
    """
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for rank in range(world):
        here, there = context.Pipe(duplex=False)
        place, interface = (0, "lo") if on_loopback else (rank, INTERFACE)
        process = context.Process(
            target=_rank, args=(links, place, interface, rank, world, there, work, arguments), daemon=True
        )
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        found = [_answer(pipe) for pipe in pipes[: answers or world]]
        for process in processes[: answers or world]:
            process.join(5)
    finally:
        for process in processes:
            process.kill()
    for rank, answer in enumerate(found):
        if isinstance(answer, str):
            raise RuntimeError(f"rank {rank} of {world}: {answer}")
    return found


def _answer(pipe: "Connection[Any, Any]") -> Any:
    try:
        return pipe.recv() if pipe.poll(_TIMEOUT_S) else "no answer in time"
    except EOFError:
        return "ended without a word"


def _rank(
    links: Links,
    place: int,
    interface: str,
    rank: int,
    world: int,
    pipe: "Connection[Any, Any]",
    work: Callable[..., Any],
    arguments: Any,
) -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    try:
        links.enter(place)
        os.environ |= {"GLOO_SOCKET_IFNAME": interface, "MASTER_ADDR": links.address(0)}
        keep_freed_memory()
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://{links.address(0)}:{_PORT}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=_TIMEOUT_S),
        )
        found = work(links, *arguments)
        dist.barrier()
        pipe.send(found)
        pipe.close()
        time.sleep(0.5 if rank == 0 else 0.0)  # rank 0 holds the store that the others leave
    except Exception:
        pipe.send(traceback.format_exc())
    finally:
        os._exit(0)
