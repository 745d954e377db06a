"""What peers learn by gossip, beside data_parallel with the same rows, settings and number of ranks that learn.

    python -m benchmarks.gossip [--split validation] [--lr 0.004]

mnist, a perceptron 784-128-10, three ranks that learn, by torchrun. Exit code 1 where the goal is missed. docs/gossip.md
has the figures.
"""

import argparse
import multiprocessing
import sys
from typing import TYPE_CHECKING, Any

from benchmarks.jobs import make_job, with_settings
from benchmarks.report import Figure, at_most, report

if TYPE_CHECKING:
    from pipelines.train.job import TrainJob

CONFIG = "conf/mnist.yaml"
OVERRIDES = (
    "split.validation.share=0.1",
    "train.batch_size=96",
    "train.epochs=5",
    "train.schedule.name=CosineAnnealingLR",
    "train.launcher=torchrun",
    "train.threads=1",
)
RUNS: dict[str, dict[str, Any]] = {
    "data_parallel": {"ranks": 3},
    "gossip": {"ranks": 4, "strategy": "gossip"},
    "gossip.every_16_steps": {"ranks": 4, "strategy": {"name": "gossip", "every_steps": 16}},
}
LR = 4e-3  # of 1e-3, 2e-3 and 4e-3 the best for data_parallel on the validation split
NEARLY = 0.005  # how much less accuracy is allowed


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=["validation", "test"], default="test", help="on which runs are judged")
    parser.add_argument("--lr", type=float, default=LR, help="learning rate of all runs")
    arguments = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(1) as apart:  # no JVM stays beside the ranks
        job = apart.apply(make_job, (CONFIG, OVERRIDES), {"lake": "gossip", "split": arguments.split})
    accuracy, figures = {}, []
    for name, settings in RUNS.items():
        accuracy[name], found = learn(job, name, settings | {"lr": arguments.lr})
        figures += found
    plain = accuracy.pop("data_parallel")
    figures += [at_most(f"{name}.accuracy_lost", plain - its, "share", NEARLY) for name, its in accuracy.items()]
    return report("gossip", figures)


def learn(job: "TrainJob", name: str, settings: dict[str, Any]) -> tuple[float, list[Figure]]:
    """Train with other settings: the accuracy behind the last epoch, and what the run was like."""
    from pipelines.config import load_config
    from pipelines.train.launch import run_job

    told = with_settings(job, **settings)
    config = load_config(CONFIG, list(OVERRIDES)).model_copy(update={"train": told.train})
    result, _ = run_job(
        config,
        told,
        on_epoch=lambda epoch: print(f"{name}: {epoch.story(told.train.epochs)}", file=sys.stderr, flush=True),
    )
    last = result.epochs[-1]
    accuracy = last.metrics["validation_accuracy"]
    exchange = [Figure(f"{name}.{key}", value, "") for key, value in last.exchange.items()]
    return accuracy, [Figure(f"{name}.accuracy", accuracy, "share"), *exchange]


if __name__ == "__main__":
    sys.exit(main())
