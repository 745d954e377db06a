"""What `benchmarks.comm` trains: tables of a workload, written once, and jobs on them."""

from dataclasses import dataclass

import torch

from benchmarks.jobs import make_job
from pipelines.models.build import build_network
from pipelines.train.costs import Size
from pipelines.train.job import TrainJob
from pipelines.train.objective import Objective
from pipelines.train.strategies.sizes import size_of


@dataclass(frozen=True)
class Workload:
    """A network on its tables.

    Attributes:
        name: Of the network.
        judged_by: What it is judged by behind the last epoch.
        path: Of the config.
        overrides: Of it.
        without: Strategies that are not tried with it.
    """

    name: str
    judged_by: str
    path: str
    overrides: tuple[str, ...]
    without: tuple[str, ...] = ()


WORKLOADS = (
    Workload(
        "mlp",
        "accuracy",
        "conf/mnist.yaml",
        (
            "split.validation.share=0.1",
            "model.hidden=[512,512]",
            "train.batch_size=128",
            "train.epochs=5",
            "train.schedule.name=CosineAnnealingLR",
            "train.threads=1",
        ),
    ),
    Workload(
        "gpt",
        "loss",
        "conf/shakespeare.yaml",
        ("train.threads=1",),
        without=("powersgd_4", "qsgd_4bit"),
    ),
)


def jobs_of(split: str) -> dict[str, TrainJob]:
    """A job for each workload, judged on a split."""
    return {it.name: make_job(it.path, it.overrides, lake="comm", split=split, name=it.name) for it in WORKLOADS}


def size_of_job(job: TrainJob) -> Size:
    """What of its network passes between ranks."""
    network = build_network(job.model, job.contract)
    objective = Objective(network, job.contract, torch.device("cpu"))
    return size_of(network, objective.inputs(objective.zeros()))
