"""`train.strategy: auto`: the fastest of the strategies that fit the ranks' memory, found by a few steps of each.

What a strategy exchanges at a step (`costs.py`) takes at least so long on the link as it is measured here: one that
would take longer than the fastest so far is not tried.
"""

import time
from collections.abc import Callable, Iterator

import psutil
import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict
from torch import nn

from pipelines.config import strategies as config
from pipelines.errors import ConfigError
from pipelines.models.build import Layered, Paired, build_network
from pipelines.stream import Batch
from pipelines.stream.plan import assign_lanes
from pipelines.train.clock import StepClock
from pipelines.train.costs import exchange
from pipelines.train.job import TrainJob
from pipelines.train.objective import Objective
from pipelines.train.optimizer import make_optimizer
from pipelines.train.strategies import Setting, make_strategy
from pipelines.train.strategies.sizes import size_of

FIRST_STEP, TRIED_STEPS = 3, 3  # behind those that warm up, so many of which the shortest counts
_PROBE_BYTES = 1 << 22  # what the link is measured with


class Choice(BaseModel):
    """A strategy and why.

    Attributes:
        why: In one line: the network's size, the link, and each strategy's step.
    """

    model_config = ConfigDict(frozen=True)

    strategy: config.Strategy
    why: str


def choose(job: TrainJob, device: torch.device, clock: StepClock) -> Choice:
    """Try strategies on this job's ranks; collective, and the same answer on all. Some seconds.

    Args:
        job: Whose ranks these are.
        device: Where this rank computes.
        clock: Ticks as the tries get on.
    """
    network = build_network(job.model, job.contract).to(device)
    objective = _objective(job, network, device)
    size = size_of(network, objective.inputs(objective.zeros(1)))
    link = _bytes_per_s(device)
    network_mb, limit_mb = 4e-6 * size.parameters, _memory_mb(job, device)
    told, tried = [], dict[str, tuple[float, config.Strategy]]()
    fastest = float("inf")
    for name, strategy in candidates(job, network, objective):
        held_mb = network_mb * _copies(job) / _parts(strategy, dist.get_world_size())
        least = exchange(strategy, size, ranks=job.train.ranks, rows=job.train.batch_size).path_bytes / link
        if held_mb > limit_mb:
            told.append(f"{name} does not fit: {held_mb:,.0f} of {limit_mb:,.0f} MB")
        elif least > fastest:
            told.append(f"{name} over {1e3 * least:,.1f} ms for the link alone")
        else:
            try:
                step_s = _step_s(job, device, strategy, clock)
            except ConfigError as error:  # on all ranks alike
                told.append(f"{name} does not fit: wanted {str(error).rpartition('wanted ')[2]}")
                continue
            tried[name] = (step_s, strategy)
            fastest = min(fastest, step_s)
            told.append(f"{name} {1e3 * step_s:,.1f} ms")
    if not tried:
        tried["sharded"] = (0.0, config.Sharded())  # holds the least
    best = min(tried, key=lambda name: tried[name][0])
    why = f"{best}: a network of {_size(network_mb)}, {8e-6 * link:,.0f} Mbit/s between ranks; a step of {', '.join(told)}"
    return Choice(strategy=tried[best][1], why=why)


def candidates(job: TrainJob, network: nn.Module, objective: Objective) -> Iterator[tuple[str, config.Strategy]]:
    """What `auto` may stand for, by name; those that exchange least first."""
    options = job.train.strategy
    if isinstance(options, config.Auto) and options.lossy:
        yield "local_sgd", config.LocalSGD()
        yield "powersgd", config.DataParallel(hook=config.PowerSGD())
        yield "fp16", config.DataParallel(hook=config.Half(name="fp16"))
    yield "data_parallel", config.DataParallel()
    parts = job.train.micro_batches or job.train.ranks  # 1F1B takes one for each stage
    if isinstance(network, Layered) and not objective.ranker and parts >= job.train.ranks:
        yield "pipeline_parallel", config.PipelineParallel()
    if isinstance(network, Paired) and network.linear_pairs():
        yield "tensor_parallel", config.TensorParallel()
    yield "sharded", config.Sharded()


def behind_warmup(strategy: config.Strategy) -> config.Strategy:
    """With a hook's warm-up cut short: from its third step on it exchanges as in most of a run."""
    if isinstance(strategy, config.DataParallel) and isinstance(strategy.hook, config.PowerSGD | config.TopK):
        warmed = {"warmup_steps": 2 if isinstance(strategy.hook, config.PowerSGD) else 0}
        return strategy.model_copy(update={"hook": strategy.hook.model_copy(update=warmed)})
    return strategy


def _parts(strategy: config.Strategy, ranks: int) -> int:
    """Among how many ranks the network is split."""
    return ranks if isinstance(strategy, config.Sharded) else config.group_size(strategy, ranks)


def _copies(job: TrainJob) -> int:
    """Of the parameters: themselves, gradients, and what most optimizers keep."""
    return 2 + (0 if job.train.optimizer.name == "SGD" and not job.train.optimizer.params.get("momentum") else 2)


def _step_s(job: TrainJob, device: torch.device, options: config.Strategy, clock: StepClock) -> float:
    """Seconds of a step on the slowest rank."""
    train = job.train.model_copy(
        update={"strategy": behind_warmup(options), "lanes": job.train.num_lanes, "compile": False}
    )
    torch.manual_seed(job.seed)
    network = build_network(job.model, job.contract).to(device)
    objective = _objective(job, network, device)
    strategy = make_strategy(network, Setting(train, objective, device, clock, job.layer_times_path))
    optimizer = make_optimizer(train, strategy.parameters, is_plain=strategy.plain_optimizer)
    strategy.settle()
    network.train()
    lanes = assign_lanes(train.num_lanes, strategy.data_ranks)[strategy.data_rank]
    lane_rows = (train.batch_size // train.num_lanes,) * len(lanes)
    tensors = objective.zeros(sum(lane_rows))
    batch = Batch(step=0, tensors={}, rows=sum(lane_rows), global_rows=train.batch_size, lane_rows=lane_rows)

    def step(*, is_last: bool = False) -> None:
        strategy.step(batch, tensors)
        strategy.optimize(optimizer)
        strategy.after_step(is_last=is_last)

    seconds = min([_seconds(step, device) for _ in range(FIRST_STEP + TRIED_STEPS)][FIRST_STEP:])
    if isinstance(options, config.Local):
        seconds += max(0.0, _seconds(lambda: step(is_last=True), device) - seconds) / options.every_steps
    return seconds


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """What it takes the slowest rank, all having begun together."""
    dist.barrier()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    taken = torch.tensor(time.perf_counter() - began, dtype=torch.float64, device=device)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def _bytes_per_s(device: torch.device) -> float:
    """What a rank's link carries, by a sum over all ranks."""
    probe = torch.zeros(_PROBE_BYTES // 4, device=device)
    ranks = dist.get_world_size()
    seconds = min(_seconds(lambda: dist.all_reduce(probe), device) for _ in range(2))
    return 2 * (ranks - 1) / ranks * _PROBE_BYTES / seconds


def _memory_mb(job: TrainJob, device: torch.device) -> float:
    """What a rank may hold, the least of all."""
    if job.train.memory_mb:
        free = float(job.train.memory_mb)
    elif device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] / 1e6
    else:
        free = psutil.virtual_memory().available / 1e6 / job.train.ranks
    least = torch.tensor(free, dtype=torch.float64, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return float(least)


def _size(mb: float) -> str:
    return f"{mb:,.1f} MB" if mb >= 1 else f"{1e3 * mb:,.1f} kB"


def _objective(job: TrainJob, network: nn.Module, device: torch.device) -> Objective:
    return Objective(network, job.contract, device, class_weights=job.class_weights, amp=job.train.amp)
