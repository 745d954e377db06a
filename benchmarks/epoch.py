"""An epoch of mnist_softmax on one rank, through Petastorm, against a bare PyTorch loop over tensors in memory.

    python -m benchmarks.epoch

Both take the same batches in the same order, eight epochs in turn, each in a process of its own; training is stopped
(SIGSTOP), its readers with it, while the bare loop runs. The bare loop has all cores, its pixels as float32 already,
and keeps no metrics and no receipt.
"""

import itertools
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.jobs import make_job
from benchmarks.report import Figure, at_most, report

if TYPE_CHECKING:
    from pipelines.train.job import EpochResult, TrainJob

TURN = 8  # epochs; one alone would be the one after a stop, which no user has
EPOCHS = 1 + 6 * TURN  # the first warms up
BOUND = 1.3


def main() -> int:
    """Returns the exit code."""
    job = make_job("conf/mnist_softmax.yaml", ["train.ranks=1", f"train.epochs={EPOCHS}"], lake="epoch")
    bare_epochs = bare_loop(job)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=train, args=(job, there), daemon=True)
    process.start()
    ours: list[float] = []
    waited: list[float] = []
    bare: list[float] = []
    assert process.pid is not None
    for turn in [1, *[TURN] * ((EPOCHS - 1) // TURN)]:
        seen = [here.recv() for _ in range(turn)]
        ours += [seconds for seconds, _ in seen]
        waited += [share for _, share in seen]
        bare += itertools.islice(bare_epochs, turn)
        os.kill(process.pid, signal.SIGCONT)
    process.join()
    ours, waited, bare = ours[1:], waited[1:], bare[1:]
    ratio = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
    return report(
        "epoch",
        [
            Figure("mnist_softmax.epoch.headrace", statistics.median(ours), "s"),
            Figure("mnist_softmax.epoch.bare_loop", statistics.median(bare), "s"),
            Figure("mnist_softmax.epoch.data_wait_share", statistics.median(waited), "share"),
            at_most("mnist_softmax.epoch.ratio", ratio, "x", BOUND),
        ],
    )


def train(job: "TrainJob", pipe: "Connection[tuple[float, float], None]") -> None:
    """Train as a rank does; after each epoch tell its seconds and data wait share, after a turn stop until continued."""
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    from pipelines.stream.memory import keep_freed_memory
    from pipelines.train.loop import Trainer
    from pipelines.train.worker import default_threads

    def on_epoch(seen: "EpochResult") -> None:
        pipe.send((seen.rows / seen.rows_per_s, seen.data_wait_share))
        if seen.epoch % TURN == 0:
            os.kill(os.getpid(), signal.SIGSTOP)

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    keep_freed_memory()
    torch.set_num_threads(default_threads(1))
    Trainer(job, torch.device("cpu")).run(on_epoch)
    os._exit(0)  # as a rank does


def bare_loop(job: "TrainJob") -> Iterator[float]:
    """The seconds that each epoch's batches take, made ready beforehand."""
    import torch
    from torch import nn

    from pipelines.stream import LaneLoader

    settings = job.train
    network = nn.Linear(784, 10)
    optimizer = torch.optim.SGD(network.parameters(), lr=settings.lr)
    for epoch in range(EPOCHS):
        loader = LaneLoader(
            job.snapshot,
            settings.batch_size,
            lanes=settings.num_lanes,
            window=settings.window,
            seed=job.seed,
            epochs=epoch + 1,  # nothing is read ahead while the loop below runs
            rank=0,
            world_size=1,
        )
        loader.load_state_dict(loader.state_dict() | {"epoch": epoch})
        # Pixels in [-1, 1] of shape (B, 784), labels of shape (B,).
        data = [(b.tensors["image"].flatten(1).float() / 127.5 - 1.0, b.tensors["label"].clone()) for b in loader]
        started = time.perf_counter()
        for x_BD, y_B in data:
            loss = nn.functional.cross_entropy(network(x_BD), y_B)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        yield time.perf_counter() - started


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[1])
    raise SystemExit(main())
