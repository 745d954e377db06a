"""What the lanes promise, each measured in a process of its own, printed as JSON:

python -m benchmarks.lanes resume|memory TABLE
python -m benchmarks.lanes growth TABLE TABLE ...
python -m benchmarks.lanes peak TABLE ROWS
python -m benchmarks.lanes wait WORKLOAD
python -m benchmarks.lanes balance TABLE off|auto
"""

import json
import multiprocessing
import os
import re
import resource
import statistics
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from benchmarks.jobs import make_job

BATCH, LANES = 1024, 2
TRIALS = 5


def resume(table: str) -> dict[str, float]:
    """Seconds to the first batch after a resume at 10 %, 50 % and 90 % of an epoch, medians."""
    from pipelines.stream import LaneLoader, Snapshot

    snapshot = Snapshot.open(table)
    seconds: dict[str, list[float]] = {"0.1": [], "0.5": [], "0.9": []}
    state = LaneLoader(snapshot, BATCH, lanes=LANES).state_dict()
    for trial in range(3 * TRIALS + 1):
        for share, found in seconds.items():
            started = time.perf_counter()
            with LaneLoader(snapshot, BATCH, lanes=LANES, epochs=2) as loader:
                loader.load_state_dict(state | {"step": int(float(share) * len(loader))})
                next(iter(loader))
                found += [time.perf_counter() - started] if trial else []
            _wait_for_readers()
    return {share: statistics.median(found) for share, found in seconds.items()}


def _wait_for_readers() -> None:
    """A loader that is closed leaves the reads that are under way to their end; the next resume is in a process of its own."""
    for thread in threading.enumerate():
        if thread.name.startswith("read"):
            thread.join()


def memory(table: str) -> dict[str, Any]:
    """Peak memory of each of 5 epochs, and what the plan predicts of it, in MB."""
    from pipelines.config.learning import Train
    from pipelines.stream import LaneLoader, Snapshot
    from pipelines.stream.forecast import forecast
    from pipelines.stream.memory import keep_freed_memory

    keep_freed_memory()
    snapshot, me = Snapshot.open(table), psutil.Process()
    base = me.memory_info().rss / 1e6
    peaks = []
    with LaneLoader(snapshot, BATCH, lanes=LANES, epochs=TRIALS) as loader:
        for _ in range(TRIALS):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew; proc(5)
            for _batch in loader:
                pass
            (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
            peaks.append(int(peak) * 1024 / 1e6)
        settings = Train(ranks=1, lanes=LANES, batch_size=BATCH)
        held = forecast(snapshot, loader.columns, settings, seed=0).ranks[0].held_bytes / 1e6
    return {"peaks": peaks, "predicted": base + held}


def growth(*tables: str) -> list[list[float]]:
    """Seconds that as many rows as the last table has take from each table, in as many epochs as that needs.

    In rounds over the tables: what else the machine does meets all of them.
    """
    from pipelines.stream import LaneLoader, Snapshot
    from pipelines.stream.memory import keep_freed_memory

    keep_freed_memory()
    snapshots = [Snapshot.open(table) for table in tables]
    rounds: list[list[float]] = []
    for _ in range(TRIALS + 1):
        rounds.append([])
        for snapshot in snapshots:
            epochs = snapshots[-1].rows // snapshot.rows
            started = time.perf_counter()
            with LaneLoader(snapshot, BATCH, lanes=LANES, epochs=epochs) as loader:
                for _ in range(epochs):
                    for _batch in loader:
                        pass
            rounds[-1].append(time.perf_counter() - started)
    return rounds[1:]  # the first warms up


def peak(table: str, rows: str) -> dict[str, float]:
    """The peak of memory above that of an idle process, in MB, over as many epochs as have so many rows."""
    from pipelines.stream import LaneLoader, Snapshot
    from pipelines.stream.memory import keep_freed_memory

    keep_freed_memory()
    snapshot = Snapshot.open(table)
    epochs = int(rows) // snapshot.rows
    base = psutil.Process().memory_info().rss / 1e6
    with LaneLoader(snapshot, BATCH, lanes=LANES, epochs=epochs) as loader:
        for _ in range(epochs):
            for _batch in loader:
                pass
    return {"mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000 - base}


def wait(workload: str) -> dict[str, float]:
    """The share of the step time that training on one rank waits for data, the median epoch."""
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    from pipelines.stream.memory import keep_freed_memory
    from pipelines.train.job import EpochResult
    from pipelines.train.loop import Trainer
    from pipelines.train.worker import default_threads

    job = make_job(f"conf/{workload}.yaml", ["train.ranks=1", f"train.epochs={TRIALS + 1}"], lake="epoch")
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    keep_freed_memory()
    torch.set_num_threads(default_threads(1))
    epochs: list[EpochResult] = []
    Trainer(job, torch.device("cpu")).run(epochs.append)
    return {"share": statistics.median(result.data_wait_share for result in epochs[1:])}


ROW_S, SLOWED, RANKS = 0.002, 5, 4
STEPS = {"off": 40, "auto": 120}


def balance(table: str, how: str) -> dict[str, float]:
    """Rows per second of 4 ranks, one of them slowed 5 times by a sleep in proportion to its rows; C = 32."""
    context = multiprocessing.get_context("fork")
    pipes = []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(RANKS):
            here, there = context.Pipe(duplex=False)
            context.Process(target=_slow_rank, args=(rank, table, how, f"{folder}/store", there), daemon=True).start()
            pipes.append(here)
        rates: list[float] = [pipe.recv() for pipe in pipes]
    return {"rows_per_s": min(rates), "bound": (RANKS - 1 + 1 / SLOWED) / ROW_S}


def _slow_rank(rank: int, table: str, how: str, store: str, pipe: "Connection[float, None]") -> None:
    """Loads, sleeps for each row, and meets the others at every step, as training does."""
    import torch
    import torch.distributed as dist

    from pipelines.stream import LaneLoader, Snapshot
    from pipelines.train.balance import Balance
    from pipelines.train.clock import StepClock

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    row_s = ROW_S * (SLOWED if rank == RANKS - 1 else 1)
    clock = StepClock(torch.device("cpu"))
    with LaneLoader(Snapshot.open(table), 256, lanes=32, epochs=1) as loader:
        balanced = Balance(loader, clock, torch.device("cpu"))
        clock.start(0, 0)
        balanced.start(0)
        rows, began = 0, 0.0
        for batch in loader:
            if batch.step == STEPS[how] // 3:  # lanes have moved by then
                rows, began = 0, time.perf_counter()
            clock.enter("forward")
            time.sleep(row_s * batch.rows)
            clock.enter("communication")
            dist.barrier()
            clock.enter("data")
            rows += batch.global_rows
            if batch.step == STEPS[how]:
                break
            if how == "auto":
                balanced.look(batch)
    pipe.send((rows - batch.global_rows) / (time.perf_counter() - began))
    os._exit(0)


MEASURES = {
    "resume": resume,
    "memory": memory,
    "growth": growth,
    "peak": peak,
    "wait": wait,
    "balance": balance,
}

if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[1])
    print(json.dumps(MEASURES[sys.argv[1]](*sys.argv[2:])))  # type: ignore[operator]
    sys.stdout.flush()
    os._exit(0)
