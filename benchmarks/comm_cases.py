"""What `benchmarks.comm` tries: strategies and hooks, each on links of several rates."""

import itertools
import math
import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks.comm_jobs import WORKLOADS
from benchmarks.jobs import with_settings
from benchmarks.links import Links
from benchmarks.ranks import Watched, run_ranks, sum_buckets, train_steps, train_whole
from pipelines.config.strategies import Gossip, Local
from pipelines.train.choose import behind_warmup
from pipelines.train.costs import Run
from pipelines.train.job import TrainJob

RATES = {"1gbit": 1000, "100mbit": 100, "20mbit": 20}  # Mbit/s
STEPS = {"1gbit": 40, "100mbit": 20, "20mbit": 6}  # that are timed, of strategies that exchange at each
FIRST = 6  # step that is timed: buckets are laid out, and hooks are warm
EVERY = 141  # steps between exchanges of local methods: 3 an epoch of mnist
ROWS, WEAK_STEPS = 256, range(10, 90)  # of a rank, in weak scaling
TURNS = 3  # of what other work on the machine, which comes and goes, makes longer, or chance; the median counts
SHORT_S = 0.1  # a step that is mostly computing
BY_CHANCE = "parameter_server"  # workers go the same way at the same time, or do not


def _hook(name: str, **options: Any) -> dict[str, Any]:
    return {"name": "data_parallel", "hook": {"name": name, **options}}


STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": _hook("none"),
    "fp16": _hook("fp16"),
    "bf16": _hook("bf16"),
    "powersgd": _hook("powersgd", rank=1, warmup_steps=50),
    "powersgd_4": _hook("powersgd", rank=4, warmup_steps=50),
    "topk": _hook("topk", share=0.01, warmup_steps=50),
    "qsgd": _hook("qsgd", bits=8),
    "qsgd_4bit": _hook("qsgd", bits=4),
    "sharded": {"name": "sharded"},
    "tensor": {"name": "tensor_parallel"},
    "pipeline": {"name": "pipeline_parallel"},
    "local_sgd": {"name": "local_sgd", "every_steps": EVERY},
    "diloco": {"name": "diloco", "every_steps": EVERY, "outer_lr": 1.0, "outer_momentum": 0.5},
    "parameter_server": {"name": "parameter_server"},
    "backup_workers": {"name": "backup_workers"},
    "gossip": {"name": "gossip"},
}
NEVER = {"name": "local_sgd", "every_steps": 10**9}  # exchanges, so what computing and reading take alone
RANKS = {"parameter_server": 3, "backup_workers": 4, "gossip": 3}  # two that train at a time, as in the others
LOCAL = ("local_sgd", "diloco")
ON_FOUR = ("ddp", "powersgd", "topk", "sharded", "local_sgd")


def ranks_of(strategy: str) -> int:
    """With which it is tried on all links."""
    return RANKS.get(strategy, 2)


class Case(NamedTuple):
    """A strategy on links of a rate."""

    network: str
    strategy: str
    rate: str
    ranks: int

    @property
    def is_usual(self) -> bool:
        """Whether it is tried with as many ranks as on all links."""
        return self.ranks == ranks_of(self.strategy)

    @property
    def is_first_link(self) -> bool:
        """Whether it is the one of its strategy that is trained whole, too."""
        return self.is_usual and self == self.on_first_link()

    def on_first_link(self) -> "Case":
        """The same on the fastest link."""
        return self._replace(rate=next(iter(RATES)))

    def __str__(self) -> str:
        """As figures are named."""
        network = "" if self.network == WORKLOADS[0].name else f"{self.network}."
        return f"{network}{self.strategy}.{self.rate}" + (
            "" if self.ranks == ranks_of(self.strategy) else f".{self.ranks}_ranks"
        )


class Timed(NamedTuple):
    """What was seen of a case.

    Attributes:
        run: For the cost model.
        sent_bytes: By a rank at a step, the mean over ranks.
        losses: Of each rank, behind each step.
        spread: Of a rank's steps, as the cost model has it.
    """

    run: Run
    sent_bytes: float
    losses: list[list[float]]
    spread: float

    def __str__(self) -> str:
        """In one line."""
        return f"{self.run.rows / self.run.step_s:,.0f} rows/s, {self.sent_bytes:,.0f} bytes a step"


class Learned(NamedTuple):
    """What a whole run came to behind its last epoch, and what a rank sent in it, the mean over ranks."""

    judged_by: str
    value: float
    sent_bytes: float

    def __str__(self) -> str:
        """In one line."""
        return f"{self.judged_by} {self.value:.4f}, {self.sent_bytes:,.0f} bytes in all"


def cases() -> Iterator[Case]:
    """All that are timed."""
    for workload in WORKLOADS:
        tried = [name for name in STRATEGIES if name not in workload.without]
        for rate in RATES:
            yield from (Case(workload.name, strategy, rate, ranks_of(strategy)) for strategy in tried)
        yield from (Case(workload.name, strategy, "100mbit", 4) for strategy in ON_FOUR)


def time_cases(links: Links, jobs: dict[str, TrainJob], told: Callable[[Case, Timed], Timed]) -> dict[Case, Timed]:
    """All cases; those with short steps, or steps that vary by chance, by the median of some turns through all of them.

    Args:
        links: At least 4.
        jobs: By network.
        told: Called with what each turn comes to.
    """
    turns: dict[Case, list[Timed]] = {}
    for turn in range(TURNS):
        for case in cases():
            if not turn or turns[case][0].run.step_s < SHORT_S or case.strategy == BY_CHANCE:
                turns.setdefault(case, []).append(told(case, time_case(links, jobs[case.network], case)))
    return {case: sorted(seen, key=lambda it: it.run.step_s)[len(seen) // 2] for case, seen in turns.items()}


def time_case(links: Links, job: TrainJob, case: Case) -> Timed:
    """Steps of a case."""
    told = with_settings(job, ranks=case.ranks, strategy=STRATEGIES[case.strategy])
    return time_steps(links, told, case.rate, name=str(case), network=case.network)


def time_steps(links: Links, job: TrainJob, rate: str, *, name: str, network: str) -> Timed:
    """Steps of an epoch's beginning; of local methods those from one exchange to the next but one.

    Args:
        job: Freshly made by `with_settings`.
        rate: Of the links.
        name: Of the run.
        network: Whose it is.
    """
    strategy, ranks = job.train.strategy, job.train.ranks
    if isinstance(strategy, Local):
        steps = range(strategy.every_steps, 3 * strategy.every_steps)
    else:
        steps = range(
            FIRST, FIRST + (EVERY if isinstance(strategy, Gossip) else STEPS[rate])
        )  # gossip waits for no link
    links.set_rate(RATES[rate])
    told = job.model_copy(update={"train": job.train.model_copy(update={"strategy": behind_warmup(strategy)})})
    seen: list[Watched] = run_ranks(links, ranks, train_steps, told, steps, answers=job.train.is_elastic)
    run = Run(
        name=name,
        network=network,
        strategy=strategy,
        ranks=ranks,
        rows=job.train.batch_size,
        bytes_per_s=RATES[rate] * 1e6 / 8,
        ranks_per_core=ranks / (os.cpu_count() or 1),
        step_s=max(rank.seconds for rank in seen) / len(steps),
    )
    return Timed(
        run,
        seen[0].sent / ranks / len(steps),
        [rank.losses for rank in seen],
        _spread(seen[0]) if isinstance(strategy, Local) else 0.0,
    )


def time_alone(links: Links, job: TrainJob, network: str, times: int) -> Run:
    """Steps of one rank with so many times the rows of a rank of two, for the cost model; the median of some turns."""
    rows, seconds = times * job.train.batch_size // 2, []
    for _ in range(TURNS):
        told = with_settings(job, ranks=1, batch_size=rows, lanes=None)
        seen: list[Watched] = run_ranks(links, 1, train_steps, told, range(FIRST, FIRST + STEPS["1gbit"]))
        seconds.append(seen[0].seconds)
    return Run(
        name=f"{network}.alone.{rows}_rows",
        network=network,
        strategy=told.train.strategy,
        ranks=1,
        rows=rows,
        bytes_per_s=RATES["1gbit"] * 1e6 / 8,
        step_s=statistics.median(seconds) / STEPS["1gbit"],
    )


def _spread(seen: Watched) -> float:
    """Standard deviation of the logarithm of a step's seconds, by quartiles: what other processes do is left out."""
    marks = [mark.seconds for mark in seen.marks]
    low, _, high = statistics.quantiles([math.log(b - a) for a, b in itertools.pairwise(marks)], n=4)
    return (high - low) / 1.349


def spread(timed: dict[Case, Timed]) -> float:
    """Of steps in which ranks do not wait for each other."""
    return statistics.median(seen.spread for case, seen in timed.items() if case.strategy in LOCAL)


def learn(links: Links, job: TrainJob, case: Case) -> Learned:
    """Train all epochs, over links without a limit."""
    links.set_rate(None)
    told = with_settings(job, ranks=case.ranks, strategy=STRATEGIES[case.strategy])
    seen: list[Watched] = run_ranks(links, case.ranks, train_whole, told, answers=told.train.is_elastic)
    judged_by = next(workload.judged_by for workload in WORKLOADS if workload.name == case.network)
    return Learned(judged_by, seen[0].epochs[-1].metrics[f"validation_{judged_by}"], seen[0].sent / case.ranks)


def differing(timed: dict[Case, Timed]) -> list[str]:
    """Cases whose ranks learned something else than on the fastest link, in steps that both did."""
    return [
        str(case)
        for case, seen in timed.items()
        if (fastest := timed.get(case.on_first_link()))
        for ours, theirs in zip(seen.losses, fastest.losses, strict=True)
        if ours != theirs[: len(ours)]
    ]


def hidden_share(links: Links, job: TrainJob, rate: str) -> float:
    """Share of the exchange that is hidden behind backward: (steps without it + it alone - steps with it) / it alone."""
    links.set_rate(RATES[rate])
    steps = range(FIRST, FIRST + STEPS[rate])
    shares = []
    for _ in range(TURNS):
        whole: list[Watched] = run_ranks(links, 2, train_steps, with_settings(job, ranks=2), steps)
        without = run_ranks(links, 2, train_steps, with_settings(job, ranks=2, strategy=NEVER), steps)
        alone = run_ranks(links, 2, sum_buckets, whole[0].buckets, len(steps))
        takes = max(rank.seconds for rank in alone)
        shares.append((max(rank.seconds for rank in without) + takes - max(rank.seconds for rank in whole)) / takes)
    return float(statistics.median(shares))


def weak_scaling(links: Links, job: TrainJob, strategy: dict[str, Any]) -> float:
    """Rows/s of two ranks on loopback over those of one, 256 rows a rank and a thread each; the median of some turns."""
    ratios = []
    for _ in range(TURNS):
        seconds = []
        for ranks in (1, 2):
            told = with_settings(job, ranks=ranks, batch_size=ranks * ROWS, strategy=strategy)
            seen: list[Watched] = run_ranks(links, ranks, train_steps, told, WEAK_STEPS, on_loopback=True)
            seconds.append(max(rank.seconds for rank in seen))
        ratios.append(2 * seconds[0] / seconds[1])
    return statistics.median(ratios)
