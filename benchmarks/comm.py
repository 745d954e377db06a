"""Strategies and hooks on slow links: steps, bytes on the wire, and what is learned from equal rows.

    python -m benchmarks.comm [--split validation]

Ranks stand in network namespaces behind links of 1 Gbit/s, 100 Mbit/s and 20 Mbit/s (benchmarks/links.py). Steps are timed
on each, behind hooks' warm-up, which is cut short for that. What is learned does not depend on a link, which is checked by
the losses of the timed steps; so whole runs, judged on the test split, go over links without a limit. Exit code 77 where
network namespaces are not permitted, 1 where a goal is missed. docs/links.md has the figures.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.links import Links, NotPermitted
from benchmarks.report import Figure, at_least, at_most, report

if TYPE_CHECKING:
    from benchmarks.comm_cases import Case, Learned, Timed
    from pipelines.train.job import TrainJob
    from pipelines.train.simulate import Run

HELD_OUT = (  # of the cost model; named before any fit
    "ddp.20mbit",
    "fp16.1gbit",
    "powersgd.100mbit",
    "topk.20mbit",
    "qsgd.20mbit",
    "sharded.100mbit",
    "tensor.20mbit",
    "pipeline.100mbit",
    "local_sgd.1gbit",
    "diloco.20mbit",
    "ddp.100mbit.4_ranks",
    "local_sgd.100mbit.4_ranks",
)
EQUAL, NEARLY = 0.003, 0.005  # how much less accuracy counts as equal, and how much local methods may lose
NOT_PERMITTED = os.EX_NOPERM  # 77


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=["validation", "test"], default="test", help="on which runs are judged")
    split = parser.parse_args().split
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that namespaces are removed then, too
    try:
        with Links(4) as links, tempfile.TemporaryDirectory() as folder:
            return measure(links, split, Path(folder))
    except NotPermitted as error:
        print(f"bench-comm: network namespaces are not permitted here, nothing was measured: {error}")
        return NOT_PERMITTED


def measure(links: Links, split: str, folder: Path) -> int:
    """Returns the exit code."""
    from benchmarks import comm_cases
    from benchmarks.comm_jobs import WORKLOADS, make_jobs

    with multiprocessing.get_context("spawn").Pool(1) as apart:  # no JVM stays beside what is timed
        jobs = apart.apply(make_jobs, (split, folder))
    timed, figures = {}, []
    for case in comm_cases.cases(list(jobs)):
        timed[case] = comm_cases.time_steps(links, jobs[case.network], case)
        figures += shown(
            Figure(f"{case}.rows_per_s", timed[case].rows_per_s, "rows/s"),
            Figure(f"{case}.bytes_per_step", timed[case].sent_bytes, "bytes"),
        )
    if differ := comm_cases.differing(timed):
        raise RuntimeError(f"wanted the same losses on any link, seen others in {', '.join(differ)}")
    learned = {}
    for workload in WORKLOADS:
        for strategy in comm_cases.STRATEGIES:
            found = comm_cases.learn(links, jobs[workload.name], strategy, workload.judged_by)
            learned[workload.name, strategy] = found
            figures += shown(
                *(
                    Figure(f"{case}.{workload.judged_by}", found.value, "")
                    for case in timed
                    if case[:2] == (workload.name, strategy)
                )
            )
    mlp = jobs["mlp"]
    figures += goals(timed, learned)
    figures += [Figure(f"overlap.{rate}", comm_cases.hidden_share(links, mlp, rate), "share") for rate in ("100mbit",)]
    figures += [Figure("overlap", comm_cases.hidden_share(links, mlp, "1gbit"), "share")]
    figures += [at_least("weak_scaling", comm_cases.weak_scaling(links, mlp), "x", 1.6)]
    alone = [
        comm_cases.time_alone(links, job, name, times * job.train.batch_size // 2)
        for name, job in jobs.items()
        for times in comm_cases.ALONE_TIMES
    ]
    figures += simulated(timed, alone, jobs)
    return report("comm", figures)


def shown(*figures: Figure) -> tuple[Figure, ...]:
    """The figures, told while the others are still to come."""
    for figure in figures:
        print(f"{figure.id}: {figure.value:,.4g} {figure.unit}", file=sys.stderr, flush=True)
    return figures


def goals(timed: "dict[Case, Timed]", learned: "dict[tuple[str, str], Learned]") -> list[Figure]:
    """What compression and local steps are worth to the perceptron on mnist."""
    from benchmarks.comm_cases import LOCAL, Case

    def rows_per_s(strategy: str) -> float:
        return timed[Case("mlp", strategy, "100mbit", 2)].rows_per_s

    def sent(strategy: str) -> float:
        return timed[Case("mlp", strategy, "100mbit", 2)].sent_bytes

    plain = learned["mlp", "ddp"]
    loses = {strategy: plain.value - found.value for (name, strategy), found in learned.items() if name == "mlp"}
    fastest = max((name for name, lost in loses.items() if lost <= EQUAL), key=rows_per_s)
    hooks = [name for name, lost in loses.items() if name.startswith(("powersgd", "topk")) and lost <= EQUAL]
    local = [name for name in LOCAL if loses[name] <= NEARLY]
    gain = {name: rows_per_s(name) / rows_per_s("ddp") for name in loses}
    whole = {
        name: plain.sent_bytes / found.sent_bytes for (network, name), found in learned.items() if network == "mlp"
    }
    print(f"gain_100mbit is of {fastest}, local_bytes of {' or '.join(local) or 'none'}")
    return [
        at_least("gain_100mbit", gain[fastest], "x", 10.0),
        Figure("gain_100mbit.best_hook", max((gain[name] for name in hooks), default=0.0), "x"),
        at_least("powersgd_bytes", sent("ddp") / sent("powersgd"), "x", 50.0),
        Figure("powersgd_bytes.whole_run", whole["powersgd"], "x"),
        Figure("powersgd_bytes.accuracy_lost", loses["powersgd"], "share"),
        at_least("local_bytes", max((whole[name] for name in local), default=0.0), "x", 100.0),
        *(Figure(f"local_bytes.{name}.accuracy_lost", loses[name], "share") for name in LOCAL),
    ]


def simulated(timed: "dict[Case, Timed]", alone: "list[Run]", jobs: "dict[str, TrainJob]") -> list[Figure]:
    """The cost model fitted to the runs that are not held out; it is left for `make simulate`."""
    import statistics

    from benchmarks.comm_cases import LOCAL
    from benchmarks.comm_jobs import size_of_job
    from pipelines.receipt import write_json
    from pipelines.train import simulate

    runs = [seen.run for seen in timed.values()]
    held_out = [run for run in runs if run.name in HELD_OUT]
    spread = statistics.median(seen.spread for case, seen in timed.items() if case.strategy in LOCAL)
    fitted = simulate.fit(
        alone + [run for run in runs if run.name not in HELD_OUT],
        {name: size_of_job(job) for name, job in jobs.items()},
        spread=spread,
    )
    errors = {run.name: fitted.relative_error(run) for run in held_out}
    worst = max(map(abs, errors.values()))
    write_json(simulate.MODEL_PATH, fitted.model_copy(update={"error": worst}))
    return [
        *(Figure(f"simulator_error.{name}", error, "share") for name, error in errors.items()),
        at_most("simulator_error", worst, "share", 0.15),
    ]


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[1])
    sys.exit(main())
