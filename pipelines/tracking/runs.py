"""Runs: what a stage records, and the care of those that ended."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import psutil
from pydantic import BaseModel, ConfigDict

from pipelines.config.load import lake_root
from pipelines.errors import TrackingError
from pipelines.lake import Snapshot
from pipelines.tracking.store import guarded, is_embedded, mlflow_client, mlflow_module, tracking_uri

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PROCESS_TAG = "headrace.process"


class TrainingRecord(BaseModel):
    """What a run recorded of its training.

    Attributes:
        run_id: The run of the stage that trained.
        receipt: The stage's receipt, where the stage ended.
    """

    model_config = ConfigDict(frozen=True)

    run_id: str
    tags: dict[str, str]
    receipt: dict[str, Any] | None


class Run:
    """An MLflow run under way. Metrics are buffered and sent in batches: a call each costs 18 ms on SQLite."""

    def __init__(self, run_id: str) -> None:
        self.id = run_id
        self._client = mlflow_client()
        self._metrics: list[Any] = []

    def child(self, name: str) -> "Run":
        """A run under this one, beside others; `end` ends it."""
        above = self._client.get_run(self.id)
        tags = {key: value for key, value in above.data.tags.items() if key.startswith("headrace.")}
        tags |= {_PROCESS_TAG: _this_process(), "mlflow.parentRunId": self.id}
        return Run(self._client.create_run(above.info.experiment_id, tags=tags, run_name=name).info.run_id)

    def adopt(self, run_id: str) -> None:
        """Put a run of before under this one; nothing where it was removed."""
        from mlflow.exceptions import MlflowException

        with contextlib.suppress(MlflowException):
            self._client.set_tag(run_id, "mlflow.parentRunId", self.id)

    def end(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Send what is buffered, and end the run."""
        self.flush()
        self._client.set_terminated(self.id, status)

    def metrics(self, values: Mapping[str, float], *, step: int = 0) -> None:
        """Record metrics at a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._metrics += [Metric(name, float(value), now, step) for name, value in values.items()]
        if len(self._metrics) >= 500:
            self.flush()

    def flush(self) -> None:
        """Send what is buffered."""
        for at in range(0, len(self._metrics), 1000):
            self._client.log_batch(self.id, metrics=self._metrics[at : at + 1000])
        self._metrics = []

    def params(self, values: Mapping[str, Any]) -> None:
        """Record parameters; long values are cut at MLflow's limit."""
        from mlflow.entities import Param

        params = [Param(name, str(value)[:6000]) for name, value in values.items()]
        for at in range(0, len(params), 100):
            self._client.log_batch(self.id, params=params[at : at + 100])

    def tags(self, values: Mapping[str, str]) -> None:
        """Record tags."""
        for name, value in values.items():
            self._client.set_tag(self.id, name, value)

    def note(self, markdown: str) -> None:
        """Set the description that the UI shows."""
        self.tags({"mlflow.note.content": markdown})

    def text(self, name: str, content: str) -> None:
        """Keep a text artifact."""
        self._client.log_text(self.id, content, name)

    def json(self, name: str, value: Any) -> None:
        """Keep a JSON artifact."""
        self._client.log_dict(self.id, value, name)

    def figure(self, name: str, figure: "Figure") -> None:
        """Keep a plot as a PNG."""
        self._client.log_figure(self.id, figure, name)

    def dataset(self, snapshot: Snapshot, *, name: str, context: str) -> None:
        """Record a Snapshot as an input, with path, version and digest as tags of our own.

        MLflow's Delta source drops version 0 when it reloads, so the tags are what counts.
        """
        from mlflow.data.delta_dataset_source import DeltaDatasetSource
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag

        source = DeltaDatasetSource(path=snapshot.table, delta_table_version=snapshot.version)
        dataset = MetaDataset(source, name=name, digest=snapshot.digest[:16])  # type: ignore[abstract]
        tag = InputTag("mlflow.data.context", context)
        self._client.log_inputs(self.id, [DatasetInput(dataset._to_mlflow_entity(), [tag])])
        self.tags(
            {
                f"headrace.{context}.delta_path": snapshot.table,
                f"headrace.{context}.delta_version": str(snapshot.version),
                f"headrace.{context}.file_digest": snapshot.digest,
                f"headrace.{context}.row_digest": snapshot.row_digest,
            }
        )


@contextlib.contextmanager
def start_run(workload: str, name: str, *, parent: str | None, system_metrics: bool = False) -> Iterator[Run]:
    """A run of the workload's experiment that ends with the body: finished, failed or killed."""
    mlflow = mlflow_module()
    experiment = _experiment(workload)
    if system_metrics:
        mlflow.set_system_metrics_sampling_interval(2)
    tags = {"headrace.workload": workload, "headrace.stage": name, _PROCESS_TAG: _this_process()}
    active = guarded(
        f"start run {name}",
        lambda: mlflow.start_run(
            experiment_id=experiment,
            run_name=name,
            nested=parent is not None,
            parent_run_id=parent,
            tags=tags,
            log_system_metrics=system_metrics,
        ),
    )
    run = Run(active.info.run_id)
    status = "FAILED"
    try:
        yield run
        run.flush()
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        with contextlib.suppress(Exception):
            mlflow.end_run(status)


def _experiment(workload: str) -> str:
    client = mlflow_client()

    def find_or_make() -> str:
        if found := client.get_experiment_by_name(workload):
            return str(found.experiment_id)
        location = (lake_root() / "mlartifacts" / workload).as_uri() if is_embedded() else None
        return str(client.create_experiment(workload, artifact_location=location))

    return guarded(f"experiment {workload}", find_or_make)


def _this_process() -> str:
    return f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.2f}"


def end_stale_runs(workload: str) -> None:
    """Mark runs whose process was killed, so that the UI does not show them as running."""
    client = mlflow_client()
    runs = client.search_runs([_experiment(workload)], "attributes.status = 'RUNNING'", max_results=200)
    for run in runs:
        host, _, rest = run.data.tags.get(_PROCESS_TAG, "").partition(":")
        pid, _, started = rest.partition(":")
        if host != socket.gethostname() or not pid.isdigit():
            continue
        with contextlib.suppress(psutil.Error):
            if f"{psutil.Process(int(pid)).create_time():.2f}" == started:
                continue
        client.set_terminated(run.info.run_id, "KILLED")


def prune_runs(workload: str, *, keep: int) -> int:
    """Delete finished pipeline runs beyond the newest `keep`; those whose model is registered stay."""
    client = mlflow_client()
    experiment = _experiment(workload)
    runs = client.search_runs([experiment], "attributes.status != 'RUNNING'", max_results=5000)
    children: dict[str, list[str]] = {}
    for run in runs:
        children.setdefault(run.data.tags.get("mlflow.parentRunId", ""), []).append(run.info.run_id)
    registered = {version.run_id for version in client.search_model_versions(f"name = '{workload}'")}
    removed = 0
    for parent in children.get("", [])[keep:]:
        family = [parent]
        for run_id in family:
            family += children.get(run_id, [])
        if registered.isdisjoint(family):
            for run_id in family:
                client.delete_run(run_id)
            removed += 1
    return removed


def training_record(run_id: str) -> TrainingRecord:
    """What the run of the train stage recorded; `run_id` may be that of the pipeline run above it.

    Raises:
        TrackingError: There is no such run, or it trained nothing.
    """
    mlflow = mlflow_module()
    client = mlflow.MlflowClient()
    run = guarded(f"run {run_id}", lambda: client.get_run(run_id))
    children = f"tags.`mlflow.parentRunId` = '{run_id}' and tags.`headrace.stage` = 'train'"
    for found in (run, *client.search_runs([run.info.experiment_id], children)):
        if "headrace.training.delta_path" in found.data.tags:
            uri = f"runs:/{found.info.run_id}/receipt.json"
            receipt = None
            if any(artifact.path == "receipt.json" for artifact in client.list_artifacts(found.info.run_id)):
                receipt = guarded(f"read {uri}", lambda uri=uri: mlflow.artifacts.load_dict(uri))  # type: ignore[misc]
            return TrainingRecord(run_id=found.info.run_id, tags=found.data.tags, receipt=receipt)
    raise TrackingError(f"MLflow at {tracking_uri()}: run {run_id}: wanted a run that trained, seen none in it")
