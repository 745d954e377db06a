"""Whether `train.strategy: auto` takes the fastest: its choice on slow links, beside timed steps of all that it may take.

    make bench-auto

Two ranks behind links as in `benchmarks.comm`, two networks, three rates, with and without what learns something else:
twelve cases. Exit code 77 where network namespaces are not permitted, 1 where a choice takes 15 % longer than the best.
"""

import multiprocessing
import sys
from typing import TYPE_CHECKING

from benchmarks.links import Links, on_links
from benchmarks.report import Figure, at_most, report

if TYPE_CHECKING:
    from pipelines.config.strategies import Strategy
    from pipelines.train.choose import Choice
    from pipelines.train.job import TrainJob

RANKS, BOUND = 2, 1.15


def measure(links: Links) -> int:
    """Returns the exit code."""
    from benchmarks.comm_cases import RATES, time_steps
    from benchmarks.comm_jobs import jobs_of
    from benchmarks.jobs import with_settings
    from pipelines.config.strategies import what_is_learned

    with multiprocessing.get_context("spawn").Pool(1) as apart:  # no JVM stays beside what is timed
        jobs = apart.apply(jobs_of, ("validation",))
    figures = []
    for network, job in jobs.items():
        for rate in RATES:
            step_s, all_of = {}, tried(with_settings(job, ranks=RANKS, strategy={"name": "auto", "lossy": True}))
            for name, strategy in all_of.items():
                told = with_settings(job, ranks=RANKS, strategy=strategy.model_dump())
                step_s[name] = time_steps(links, told, rate, name=name, network=network).run.step_s
                figures += [Figure(f"{network}.{rate}.{name}", 1e3 * step_s[name], "ms")]
            for lossy in (False, True):
                choice = chosen(links, with_settings(job, ranks=RANKS, strategy={"name": "auto", "lossy": lossy}), rate)
                print(f"{network}, {rate}: {choice.why}", file=sys.stderr, flush=True)
                taken = next(name for name, strategy in all_of.items() if strategy == choice.strategy)
                best = min(step_s[name] for name in all_of if lossy or what_is_learned(all_of[name]) is None)
                case = f"auto.{network}.{rate}{'.lossy' if lossy else ''}.{taken}"
                figures += [at_most(case, step_s[taken] / best, "x", BOUND)]
    worst = max(figure.value for figure in figures if figure.goal)
    return report("auto", [*figures, at_most("auto", worst, "x", BOUND)])


def tried(job: "TrainJob") -> "dict[str, Strategy]":
    """What auto may stand for, by name."""
    import torch

    from pipelines.models.build import build_network
    from pipelines.train.choose import candidates
    from pipelines.train.objective import Objective

    network = build_network(job.model, job.contract)
    return dict(candidates(job, network, Objective(network, job.contract, torch.device("cpu"))))


def chosen(links: Links, job: "TrainJob", rate: str) -> "Choice":
    """What it takes."""
    from benchmarks.comm_cases import RATES
    from benchmarks.ranks import run_ranks

    links.set_rate(RATES[rate])
    found: list[Choice] = run_ranks(links, RANKS, choose_on_rank, job)
    return found[0]


def choose_on_rank(links: Links, job: "TrainJob") -> "Choice":
    """On a rank: see `choose`."""
    import torch

    from pipelines.train.choose import choose
    from pipelines.train.clock import StepClock

    device = torch.device("cpu")
    return choose(job, device, StepClock(device))


if __name__ == "__main__":
    sys.exit(on_links("bench-auto", RANKS, measure))
