"""Run a function on forked ranks joined by gloo. Forked, since importing torch costs seconds a process.

So does `torch._dynamo`, which DDP and the optimizers import when they are first used: it is imported in front of the fork.
"""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

TIMEOUT_S = 120


def run_ranks(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results of `work(*arguments)` on each rank; an exception on a rank is raised here."""
    import torch._dynamo

    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(rank, world, f"{folder}/store", there, work, arguments))
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        answers = []
        for pipe in pipes:
            assert pipe.poll(TIMEOUT_S), "a rank did not answer in time"
            answers.append(pipe.recv())
        for process in processes:
            process.join(10)
            process.kill()
    for kind, value in answers:
        if kind == "error":
            raise value
    return [value for _, value in answers]


def _rank(rank: int, world: int, store: str, pipe: Any, work: Callable[..., Any], arguments: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)  # makes the pool of threads anew, which a fork leaves broken, before autograd's threads do
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
        pipe.send(("value", work(*arguments)))
    except Exception as error:
        traceback.print_exc()
        pipe.send(("error", error))
    finally:
        pipe.close()
        os._exit(0)
