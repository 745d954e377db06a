"""Strategies and hooks on slow links: steps, bytes on the wire, and what is learned from equal rows.

    python -m benchmarks.comm [--split validation]

Ranks stand in network namespaces behind links of 1 Gbit/s, 100 Mbit/s and 20 Mbit/s (benchmarks/links.py). Steps are timed
on each, behind hooks' warm-up, which is cut short for that. What is learned does not depend on a link, which is checked by
the losses of the timed steps; so whole runs, judged on the test split, go over links without a limit. Exit code 77 where
network namespaces are not permitted, 1 where a goal is missed. docs/links.md has the figures.
"""

import argparse
import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from benchmarks.links import Links, on_links
from benchmarks.report import FOLDER, Figure, at_least, at_most, report

if TYPE_CHECKING:
    from benchmarks.comm_cases import Case, Learned, Timed
    from pipelines.train.costs import Run
    from pipelines.train.job import TrainJob

Seen = TypeVar("Seen")
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
    "parameter_server.100mbit",
    "gossip.100mbit",
    "gpt.ddp.20mbit",
    "gpt.topk.100mbit",
    "gpt.tensor.1gbit",
    "gpt.local_sgd.100mbit",
)
EQUAL, NEARLY = 0.003, 0.005  # how much less accuracy counts as equal, and how much local methods may lose


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=["validation", "test"], default="test", help="on which runs are judged")
    split = parser.parse_args().split
    return on_links("bench-comm", 4, lambda links: measure(links, split))


def measure(links: Links, split: str) -> int:
    """Returns the exit code."""
    from benchmarks import comm_cases
    from benchmarks.comm_jobs import jobs_of

    with multiprocessing.get_context("spawn").Pool(1) as apart:  # no JVM stays beside what is timed
        jobs = apart.apply(jobs_of, (split,))
    alone = [comm_cases.time_alone(links, job, name, times) for name, job in jobs.items() for times in (1, 4)]
    timed = comm_cases.time_cases(links, jobs, told)
    if differ := comm_cases.differing(timed):
        raise RuntimeError(f"wanted the same losses on any link, seen others in {', '.join(differ)}")
    scaled = [
        Figure("overlap", comm_cases.hidden_share(links, jobs["mlp"], "1gbit"), "share"),
        Figure("overlap.100mbit", comm_cases.hidden_share(links, jobs["mlp"], "100mbit"), "share"),
        at_least("weak_scaling", comm_cases.weak_scaling(links, jobs["mlp"], comm_cases.STRATEGIES["ddp"]), "x", 1.6),
        Figure("weak_scaling.without_exchange", comm_cases.weak_scaling(links, jobs["mlp"], comm_cases.NEVER), "x"),
    ]
    scaled += simulated([seen.run for seen in timed.values()], alone, jobs, comm_cases.spread(timed))
    print(*scaled, "what follows is not timed", sep="\n", file=sys.stderr, flush=True)
    learned = {
        case: told(case, comm_cases.learn(links, jobs[case.network], case)) for case in timed if case.is_first_link
    }
    figures = [figure for case, seen in timed.items() for figure in rows_of(case, seen, learned)]
    return report("comm", [*figures, *goals(timed, learned), *scaled])


def told(case: "Case", seen: Seen) -> Seen:
    """What was seen, said while the rest is still to come."""
    print(f"{case}: {seen}", file=sys.stderr, flush=True)
    return seen


def rows_of(case: "Case", seen: "Timed", learned: "dict[Case, Learned]") -> list[Figure]:
    """The figures of a strategy on a link; what it learned is the same on all."""
    figures = [
        Figure(f"{case}.steps_per_s", 1 / seen.run.step_s, "1/s"),
        Figure(f"{case}.rows_per_s", seen.run.rows / seen.run.step_s, "rows/s"),
        Figure(f"{case}.bytes_per_step", seen.sent_bytes, "bytes"),
    ]
    if found := learned.get(case.on_first_link()):
        figures += [Figure(f"{case}.{found.judged_by}", found.value, "")]
    return figures


def goals(timed: "dict[Case, Timed]", learned: "dict[Case, Learned]") -> list[Figure]:
    """What compression and local steps are worth to the perceptron on mnist, on links of 100 Mbit/s."""
    from benchmarks.comm_cases import LOCAL, STRATEGIES

    slow = {case.strategy: seen for case, seen in timed.items() if case[::2] == ("mlp", "100mbit") and case.is_usual}
    whole = {case.strategy: found for case, found in learned.items() if case.network == "mlp"}
    plain = whole["ddp"]
    gain = {name: slow["ddp"].run.step_s / seen.run.step_s for name, seen in slow.items()}
    loses = {name: plain.value - found.value for name, found in whole.items()}
    fewer = {name: plain.sent_bytes / found.sent_bytes for name, found in whole.items()}
    equal = [name for name in slow if loses[name] <= EQUAL]
    fastest = max(equal, key=lambda name: gain[name])
    fastest_hook = max((name for name in equal if "hook" in STRATEGIES[name]), key=lambda name: gain[name])
    fewest = max((name for name in LOCAL if loses[name] <= NEARLY), key=lambda name: fewer[name], default="ddp")
    print(f"gain_100mbit is of {fastest}, its hook of {fastest_hook}, local_bytes of {fewest}")
    return [
        at_least("gain_100mbit", gain[fastest], "x", 10.0),
        Figure("gain_100mbit.hook", gain[fastest_hook], "x"),
        at_least("powersgd_bytes", slow["ddp"].sent_bytes / slow["powersgd"].sent_bytes, "x", 50.0),
        Figure("powersgd_bytes.whole_run", fewer["powersgd"], "x"),
        at_least("local_bytes", fewer[fewest], "x", 100.0),
    ]


def simulated(runs: "list[Run]", alone: "list[Run]", jobs: "dict[str, TrainJob]", spread: float) -> list[Figure]:
    """The cost model fitted to the runs that are not held out; both are left, the model for `make simulate`."""
    from benchmarks.comm_jobs import size_of_job
    from pipelines.receipt import write_json
    from pipelines.train import simulate

    FOLDER.mkdir(parents=True, exist_ok=True)
    seen = [run.model_dump(mode="json") for run in (*alone, *runs)]
    (FOLDER / "comm_runs.json").write_text(json.dumps(seen, indent=1))
    sizes = {name: size_of_job(job) for name, job in jobs.items()}
    fitted = simulate.fit([*alone, *(run for run in runs if run.name not in HELD_OUT)], sizes, spread=spread)
    errors = {run.name: fitted.relative_error(run) for run in runs if run.name in HELD_OUT}
    worst = max(map(abs, errors.values()))
    write_json(simulate.MODEL_PATH, fitted.model_copy(update={"error": worst}))
    figures = [Figure(f"simulator_error.{name}", error, "share") for name, error in errors.items()]
    return [*figures, at_most("simulator_error", worst, "share", 0.15)]


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[1])
    sys.exit(main())
