"""A short training run of one rank, for its rate and its memory:

python -m pipelines.train.probe JOB.json SECONDS
"""

import contextlib
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from pipelines.stream import Batch
from pipelines.stream.memory import keep_freed_memory
from pipelines.train.job import Probed, TrainJob
from pipelines.train.loop import Trainer
from pipelines.train.tally import Tally
from pipelines.train.worker import default_threads


class _Enough(Exception):
    pass


def probe(job: TrainJob, seconds: float) -> Probed:
    """Train for some seconds, and keep nothing of it."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    keep_freed_memory()
    torch.set_num_threads(job.train.threads or default_threads(job.train.ranks))
    alone = job.train.model_copy(update={"ranks": 1, "balance": "off"})
    trainer = Trainer(job.model_copy(update={"train": alone}), torch.device("cpu"))
    step, began, rows = trainer._step, 0.0, 0

    def counted(batch: Batch, tally: Tally) -> None:
        nonlocal began, rows
        step(batch, tally)
        if not began:
            began = time.monotonic()  # behind the first step, which warms up
        else:
            rows += batch.rows
        if time.monotonic() - began > seconds:
            raise _Enough

    trainer._step = counted  # type: ignore[method-assign]
    trainer._save = lambda *_: None  # type: ignore[method-assign]
    with contextlib.suppress(_Enough):
        trainer.run(lambda _: None)
    return Probed(rows_per_s=rows / max(time.monotonic() - began, 1e-6), base_mb=trainer.base_mb)


if __name__ == "__main__":
    print(probe(TrainJob.model_validate_json(Path(sys.argv[1]).read_bytes()), float(sys.argv[2])).model_dump_json())
    sys.stdout.flush()
    os._exit(0)  # as a rank does
