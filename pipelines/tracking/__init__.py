"""The only package that imports mlflow: runs, models and the registry.

MLflow's own variables apply (`MLFLOW_TRACKING_URI`, credentials); without them an SQLite file and an
artifact folder in the lake serve. mlflow is imported when first needed: it costs seconds.
"""

from pipelines.tracking.models import (
    ModelRef,
    bad_request,
    download,
    load_classic,
    load_torch,
    log_classic,
    log_torch,
    model_exists,
)
from pipelines.tracking.registry import Registered, champion, move_alias, register, versions
from pipelines.tracking.runs import Run, TrainingRecord, end_stale_runs, prune_runs, start_run, training_record
from pipelines.tracking.store import check_reachable, create_store, mlflow_client, tracking_uri, ui_arguments

__all__ = [
    "ModelRef",
    "Registered",
    "Run",
    "TrainingRecord",
    "bad_request",
    "champion",
    "check_reachable",
    "create_store",
    "download",
    "end_stale_runs",
    "load_classic",
    "load_torch",
    "log_classic",
    "log_torch",
    "mlflow_client",
    "model_exists",
    "move_alias",
    "prune_runs",
    "register",
    "start_run",
    "tracking_uri",
    "training_record",
    "ui_arguments",
    "versions",
]
