"""What `benchmarks.comm` trains: tables of a workload, written once, and jobs on them."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import use_lake
from pipelines.config.learning import Train
from pipelines.config.strategies import num_servers
from pipelines.train.elastic.certificates import issue
from pipelines.train.job import TrainJob
from pipelines.train.simulate import Size


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
        without=("bf16", "powersgd_4", "qsgd_4bit", "backup_workers"),
    ),
)


def make_jobs(split: str, folder: Path) -> dict[str, TrainJob]:
    """A job for each workload, judged on a split, with its files in a folder; Spark writes tables that are not there."""
    from pipelines.config import load_config
    from pipelines.features.fitted import FittedFeatures
    from pipelines.lake import Snapshot
    from pipelines.run import run_stages
    from pipelines.train.launch import make_job

    use_lake("comm")
    jobs = {}
    for workload in WORKLOADS:
        config = load_config(workload.path, list(workload.overrides))
        made = run_stages(config, ["ingest", "features"])["features"].result
        jobs[workload.name] = make_job(
            config,
            FittedFeatures.model_validate(made["fitted"]),
            folder=folder / workload.name,
            train=Snapshot.model_validate(made["snapshots"]["train"]),
            validation=Snapshot.model_validate(made["snapshots"][split]),
        )
    return jobs


def with_settings(job: TrainJob, **train: Any) -> TrainJob:
    """The job with other settings of training, in an empty folder."""
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    told = Train.model_validate(job.train.model_dump(mode="json") | train)
    if told.is_elastic:
        servers = num_servers(told.strategy)
        issue(job.folder, ["server"] * servers + ["worker"] * (told.ranks - servers))
    return job.model_copy(update={"train": told})


def size_of_job(job: TrainJob) -> Size:
    """What of its network passes between ranks."""
    from pipelines.models.build import build_network
    from pipelines.train.objective import Objective
    from pipelines.train.strategies.sizes import size_of

    assert job.snapshot.contract is not None, "a feature table carries its contract"
    network = build_network(job.model, job.snapshot.contract)
    objective = Objective(network, job.snapshot.contract, torch.device("cpu"))
    return size_of(network, objective.inputs(objective.zeros()))
