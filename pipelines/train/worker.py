"""One rank. Started by torchrun or TorchDistributor:

torchrun --standalone --nproc-per-node 2 -m pipelines.train.worker JOB.json
"""

import ctypes
import os
import resource
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore

from pipelines import tracking
from pipelines.config.strategies import Auto, num_servers
from pipelines.errors import HeadraceError, one_line
from pipelines.features.fitted import Bundle, FittedList
from pipelines.lake import Column, Contract
from pipelines.models.build import Served
from pipelines.models.sample import sample
from pipelines.receipt import write_json
from pipelines.stream.memory import keep_freed_memory
from pipelines.train.choose import Choice, choose
from pipelines.train.clock import StepClock
from pipelines.train.elastic.chief import LostWeights
from pipelines.train.elastic.roles import chief_of, worker_of
from pipelines.train.elastic.server import PartServer
from pipelines.train.elastic.supervisor import AGAIN, supervise
from pipelines.train.heartbeat import LOGGING, Heartbeat, Place
from pipelines.train.job import EpochResult, TrainJob, TrainResult
from pipelines.train.loop import Trainer

_SIGTERM_CODE = 143
_PR_SET_PDEATHSIG = 1  # prctl(2)


def main(job_path: str) -> int:
    """Train this rank's part of the job. Returns the exit code; an error is left in the job's folder."""
    die_with_parent()
    job = TrainJob.model_validate_json(Path(job_path).read_bytes())
    rank = int(os.environ["RANK"])
    if job.train.is_elastic:
        return supervise(job, rank, lambda: _rank(job, rank))
    return _rank(job, rank)


def _rank(job: TrainJob, rank: int) -> int:
    die_with_parent()
    heartbeat = Heartbeat(job.beat_path(rank), rank)

    def tell(cause: Literal["known", "unforeseen", "ended"], message: str, *, exit_code: int) -> None:
        job.leave_error(rank, heartbeat.place(), cause, message, exit_code=exit_code)

    def leave() -> None:
        tell("ended", "ended by its launcher", exit_code=_SIGTERM_CODE)
        os._exit(_SIGTERM_CODE)

    heartbeat.on_sigterm(leave)
    try:
        _work(job, rank, heartbeat)
        heartbeat.end()
    except LostWeights:
        return AGAIN
    except HeadraceError as error:
        tell("known", str(error), exit_code=error.exit_code)
        traceback.print_exc()
        return error.exit_code
    except Exception as error:
        tell("unforeseen", one_line(f"{type(error).__name__}: {error}", limit=400), exit_code=1)
        traceback.print_exc()
        return 1
    return 0


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, so that no rank is left behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _work(job: TrainJob, rank: int, heartbeat: Heartbeat) -> None:
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = _device(job, local_world)
    keep_freed_memory()
    torch.set_num_threads(job.train.threads or default_threads(local_world))
    if job.train.is_elastic:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        if rank:
            return _serve_or_work(job, rank, device, heartbeat)
        trainer: Trainer = chief_of(job.train.strategy)(job, device)
    else:
        timeout = timedelta(seconds=2 * job.train.timeout_s)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        trying = StepClock(device)
        heartbeat.follow(lambda: Place(phase=trying.phase, ticks=trying.ticks), dict)
        trainer = Trainer(_with_strategy(job, device, trying), device)
    heartbeat.follow(trainer.place, lambda: trainer.clock.seconds)
    resumed = trainer.resume()
    started = time.monotonic()

    def tell(result: EpochResult) -> None:
        with job.epochs_path.open("a", encoding="utf-8") as file:
            file.write(result.model_dump_json() + "\n")

    if rank == 0:
        job.epochs_path.unlink(missing_ok=True)
        for done in trainer.epochs:
            tell(done)
    trainer.run(tell)
    seconds = time.monotonic() - started
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        trainer.clock.enter(LOGGING)
        uri, size, text = _log_model(job, trainer) if job.run_id else ("", 0, "")
        result = TrainResult(
            epochs=trainer.epochs,
            best_epoch=trainer.best_epoch,
            uri=uri,
            size_bytes=size,
            parameters=trainer.num_parameters,
            seconds=round(seconds, 3),
            resumed_from=resumed,
            base_mb=trainer.base_mb,
            peak_mb=peak_mb,
            sample=text,
        )
        write_json(job.result_path, result)


def _with_strategy(job: TrainJob, device: torch.device, clock: StepClock) -> TrainJob:
    """The job with the strategy that `auto` stands for; a run that starts again on as many ranks keeps it."""
    if not isinstance(job.train.strategy, Auto) or dist.get_world_size() == 1:
        return job
    is_chosen = job.choice_path.is_file()
    dist.barrier()
    choice = Choice.model_validate_json(job.choice_path.read_bytes()) if is_chosen else choose(job, device, clock)
    if dist.get_rank() == 0 and not is_chosen:
        write_json(job.choice_path, choice)
    settings = {"strategy": choice.strategy, "lanes": job.train.num_lanes}
    return job.model_copy(update={"train": job.train.model_copy(update=settings)})


def _serve_or_work(job: TrainJob, rank: int, device: torch.device, heartbeat: Heartbeat) -> None:
    """What another rank than the chief does where no collective joins them."""
    if rank < num_servers(job.train.strategy):
        server = PartServer(job, rank)
        heartbeat.follow(server.place, dict)
        return server.serve()
    worker = worker_of(job.train.strategy)(job, device, rank)
    heartbeat.follow(worker.place, lambda: worker.clock.seconds)
    return worker.work()


def default_threads(local_world: int) -> int:
    """torch's threads a rank: its share of the cores, less one that reads."""
    return max(1, (os.cpu_count() or 1) // local_world - 1)


def _device(job: TrainJob, local_world: int) -> torch.device:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= local_world
    if job.train.device == "cuda" and not enough:
        raise HeadraceError(
            f"train.device: wanted a CUDA device for each of {local_world} ranks on {socket.gethostname()}, seen "
            f"{torch.cuda.device_count()}; use device: cpu, or fewer ranks"
        )
    if job.train.device == "cpu" or not enough:
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _log_model(job: TrainJob, trainer: Trainer) -> tuple[str, int, str]:
    """Where the model is, its bytes, and what it writes where it learned sequences."""
    os.environ["MLFLOW_TRACKING_URI"] = job.tracking_uri
    network = trainer.trained().eval()
    served = Served(network, trainer.contract).eval()
    gives: Literal["prediction", "affinity"] = "affinity" if trainer.objective.ranker else "prediction"
    bundle = Bundle(name=job.model.network, kind="torch", gives=gives, fitted=job.fitted, contract=trainer.contract)
    name = job.model.network.rpartition(":")[2]  # of a class of one's own; MLflow takes no path
    uri, size = tracking.log_torch(served, name, job.run_id, examples=example_inputs(trainer.contract), bundle=bundle)
    return uri, size, _sample(job, network)


def _sample(job: TrainJob, network: nn.Module) -> str:
    if job.contract.label.kind != "next_token":
        return ""
    (sequence,) = job.fitted.inputs
    assert isinstance(sequence.whole, FittedList), "refused unless it is a sequence"
    is_text = sequence.whole.tokens is not None and sequence.whole.tokens.unit == "characters"
    return ("" if is_text else " ").join(sample(network, job.contract, seed=job.seed))


def example_inputs(contract: Contract) -> dict[str, "np.ndarray[tuple[int, ...], np.dtype[np.generic]]"]:
    """Two rows of zeros for each input of the contract.

    Lists of ids are of two or more: torch.export takes a dimension of 1 for a constant.
    """
    return {column.name: np.zeros((2, *_example_shape(column)), dtype=column.dtype) for column in contract.inputs}


def _example_shape(column: Column) -> tuple[int, ...]:
    return (max(2, column.width),) if column.kind.startswith("sparse") else column.shape


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    # A rank that used a Petastorm reader and DDP sometimes aborts in the interpreter's own exit.
    os._exit(code)
