"""What benchmarks train: jobs on tables of a workload, which are written once."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import use_lake

if TYPE_CHECKING:
    from pipelines.train.job import TrainJob


def make_job(path: str, overrides: Iterable[str], *, lake: str, split: str = "", name: str = "job") -> "TrainJob":
    """The training of a config; Spark writes tables that are not there, and ends.

    Args:
        path: Of the config.
        overrides: Of it.
        lake: The benchmark's, see `use_lake`.
        split: On which it is judged behind each epoch; without one it is not.
        name: Of its folder, which is empty.
    """
    from pipelines.config import load_config
    from pipelines.features.fitted import FittedFeatures
    from pipelines.lake import Snapshot
    from pipelines.run import run_stages
    from pipelines.session import stop_session
    from pipelines.train import launch

    folder = use_lake(lake) / name
    config = load_config(path, list(overrides))
    made = run_stages(config, ["ingest", "features"])["features"].result
    stop_session()
    return launch.make_job(
        config,
        FittedFeatures.model_validate(made["fitted"]),
        folder=_emptied(folder),
        train=Snapshot.model_validate(made["snapshots"]["train"]),
        validation=Snapshot.model_validate(made["snapshots"][split]) if split else None,
    )


def with_settings(job: "TrainJob", **settings: Any) -> "TrainJob":
    """The job with other settings of training, in an empty folder where its ranks find their identities."""
    from pipelines.config.learning import Train
    from pipelines.train.elastic.certificates import issue

    train = Train.model_validate(job.train.model_dump(mode="json") | settings)
    issue(_emptied(job.folder), train.roles)
    return job.model_copy(update={"train": train})


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
