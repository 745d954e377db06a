"""The only mlflow import: runs, models and the registry.

MLflow's own variables apply (`MLFLOW_TRACKING_URI`, credentials); without them an SQLite file and an
artifact folder in the lake serve. mlflow is imported when first needed: it costs seconds.
"""

import contextlib
import logging
import os
import shutil
import socket
import tempfile
import time
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version as installed_version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import pandas as pd
import psutil
from pydantic import BaseModel, ConfigDict

from pipelines.config.load import lake_root
from pipelines.errors import DataError, TrackingError, is_full_disk, one_line
from pipelines.features.fitted import Bundle
from pipelines.features.raw_rows import example_row
from pipelines.lake import Snapshot

if TYPE_CHECKING:
    import numpy as np
    import torch
    from matplotlib.figure import Figure
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import Model as MLflowModel
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, TensorSpec
    from pyspark.ml import Model, PipelineModel

REF_TAG, EVALUATION_TAG = "headrace.model", "headrace.evaluation"
_PROCESS_TAG = "headrace.process"
_PACKAGE = Path(__file__).resolve().parent
# What the modules that serve import, beside torch or pyspark.
_NEEDED = ("mlflow", "numpy", "pandas", "pyarrow", "pydantic", "pyyaml", "psutil", "xxhash", "deltalake", "pillow")
T = TypeVar("T")
_Specs: TypeAlias = "list[ColSpec | TensorSpec]"


class ModelRef(BaseModel):
    """A model logged in MLflow, and what it came from.

    Attributes:
        name: The estimator's or network's own name.
        uri: `models:/m-...`, where MLflow holds it.
        snapshot: File digest of the training Snapshot.
        features: Digest of the FittedFeatures.
        path: Where a classic model was saved under the lake as well.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    kind: Literal["classic", "torch"]
    uri: str
    size_bytes: int
    snapshot: str
    features: str
    fit_seconds: float = 0.0
    path: str = ""


class Registered(BaseModel):
    """A version of a workload's registered model."""

    model_config = ConfigDict(frozen=True)

    version: int
    ref: ModelRef
    evaluation: str
    tags: dict[str, str] = {}


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


def tracking_uri() -> str:
    """Where runs go."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _embedded_uri()


def _embedded_uri() -> str:
    return f"sqlite:///{lake_root() / 'mlflow.db'}"


def _is_embedded() -> bool:
    return tracking_uri() == _embedded_uri()  # MLflow itself sets the variable, once its URI is set


def check_reachable() -> None:
    """Ask a tracking server for a sign of life, once and with a short limit.

    Raises:
        TrackingError: No answer. MLflow itself would retry for minutes.
    """
    uri = tracking_uri()
    if not uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5).close()  # noqa: S310
    except urllib.error.HTTPError:
        return  # it answers; what it thinks of the question comes later
    except (OSError, ValueError) as error:
        raise TrackingError(
            f"MLFLOW_TRACKING_URI {uri}: wanted an MLflow server, seen {one_line(str(error))}; start it or unset the "
            "variable to use the lake's own"
        ) from None


def _mlflow() -> ModuleType:
    warnings.filterwarnings("ignore", module=r"mlflow|pydantic|google")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what matters is raised as well
    mlflow.set_tracking_uri(tracking_uri())
    return mlflow


def create_store() -> None:
    """Make the embedded store's tables, which takes seconds the first time."""
    if _is_embedded():
        lake_root().mkdir(parents=True, exist_ok=True)
    _mlflow().MlflowClient().search_experiments(max_results=1)


def _guarded(what: str, call: Callable[[], T]) -> T:
    """`call()`, with MLflow's errors as ours."""
    from mlflow.exceptions import MlflowException

    try:
        return call()
    except MlflowException as error:
        if is_full_disk(str(error)):
            raise
        raise TrackingError(f"MLflow at {tracking_uri()}: {what}: {one_line(str(error))}") from None


def _experiment(workload: str) -> str:
    client = _mlflow().MlflowClient()

    def find_or_make() -> str:
        if found := client.get_experiment_by_name(workload):
            return str(found.experiment_id)
        location = (lake_root() / "mlartifacts" / workload).as_uri() if _is_embedded() else None
        return str(client.create_experiment(workload, artifact_location=location))

    return _guarded(f"experiment {workload}", find_or_make)


class Run:
    """An MLflow run under way. Metrics are buffered and sent in batches: a call each costs 18 ms on SQLite."""

    def __init__(self, run_id: str) -> None:
        self.id = run_id
        self._client = _mlflow().MlflowClient()
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
    mlflow = _mlflow()
    experiment = _experiment(workload)
    if system_metrics:
        mlflow.set_system_metrics_sampling_interval(2)
    tags = {"headrace.workload": workload, "headrace.stage": name, _PROCESS_TAG: _this_process()}
    active = _guarded(
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


def _this_process() -> str:
    return f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.2f}"


def end_stale_runs(workload: str) -> None:
    """Mark runs whose process was killed, so that the UI does not show them as running."""
    client = _mlflow().MlflowClient()
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
    client = _mlflow().MlflowClient()
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
    mlflow = _mlflow()
    client = mlflow.MlflowClient()
    run = _guarded(f"run {run_id}", lambda: client.get_run(run_id))
    children = f"tags.`mlflow.parentRunId` = '{run_id}' and tags.`headrace.stage` = 'train'"
    for found in (run, *client.search_runs([run.info.experiment_id], children)):
        if "headrace.training.delta_path" in found.data.tags:
            uri = f"runs:/{found.info.run_id}/receipt.json"
            receipt = None
            if any(artifact.path == "receipt.json" for artifact in client.list_artifacts(found.info.run_id)):
                receipt = _guarded(f"read {uri}", lambda uri=uri: mlflow.artifacts.load_dict(uri))  # type: ignore[misc]
            return TrainingRecord(run_id=found.info.run_id, tags=found.data.tags, receipt=receipt)
    raise TrackingError(f"MLflow at {tracking_uri()}: run {run_id}: wanted a run that trained, seen none in it")


def _requirements(*packages: str) -> list[str]:
    """Pinned requirements of a model; given to MLflow, which else runs the model to infer them (8 to 22 s)."""
    return [f"{package}=={installed_version(package)}" for package in packages]


class _RawRows:
    """A flavor of MLflow, with a python_function that takes raw rows instead of vectors or tensors.

    The function is a module of this package, whose source goes with the model: no package index has it, and a model is
    applied by the code that fitted it.

    Args:
        flavor: MLflow's own module, such as `mlflow.spark`; its files stay as they are.
        loader: The module that `mlflow.pyfunc` loads the model by.
        bundle: Kept beside the model.
    """

    def __init__(self, flavor: ModuleType, loader: str, bundle: Bundle) -> None:
        self.flavor, self.loader, self.bundle = flavor, loader, bundle
        self.size_bytes = 0

    def save_model(self, path: str, mlflow_model: "MLflowModel", **options: Any) -> None:
        """Save a model in the folder `path`; called by MLflow."""
        from mlflow import pyfunc
        from mlflow.models.utils import _save_example

        folder = Path(path)
        self.flavor.save_model(path=path, mlflow_model=mlflow_model, **options)
        self.bundle.save(folder)
        self.size_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        _copy_package(folder / "code")
        environment = {"conda_env": "conda.yaml", "python_env": "python_env.yaml"}
        pyfunc.add_to_model(mlflow_model, loader_module=self.loader, code="code", **environment)
        mlflow_model.signature = _signature(self.bundle)
        mlflow_model.metadata = {"columns": self.bundle.fitted.columns}
        _save_example(mlflow_model, pd.DataFrame([example_row(self.bundle.fitted)]), path)
        mlflow_model.save(str(folder / "MLmodel"))


def _copy_package(folder: Path) -> None:
    """Copy this package's source, which on a cluster's ranks lies in a zip (see `session`)."""
    archive = next((path for path in _PACKAGE.parents if zipfile.is_zipfile(path)), None)
    if archive is None:
        shutil.copytree(_PACKAGE, folder / _PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)


def _signature(bundle: Bundle) -> "ModelSignature":
    """Raw columns, and what the score stage makes of them.

    MLflow's own types would refuse a whole number for a double and a missing one for an int, and take a missing boolean
    for False; so to MLflow the columns are optional and of any type, and `to_table` looks at them.
    """
    from mlflow.models import ModelSignature
    from mlflow.types.schema import AnyType, Array, ColSpec, DataType, Schema

    inputs: _Specs = [ColSpec(AnyType(), name, required=False) for name in bundle.fitted.columns]  # type: ignore[no-untyped-call]
    outputs: _Specs
    if bundle.gives == "affinity":
        outputs = [ColSpec(DataType.double, "score")]
    elif bundle.contract.label.is_number:
        outputs = [ColSpec(DataType.double, "prediction")]
    elif bundle.contract.label.kind == "multilabel":
        outputs = [ColSpec(Array(DataType.string), "prediction"), ColSpec(Array(DataType.double), "probabilities")]
    else:
        outputs = [
            ColSpec(DataType.integer if bundle.contract.label.kind == "none" else DataType.string, "prediction"),
            ColSpec(DataType.double, "probability", required=False),
            ColSpec(DataType.double, "score", required=False),
            ColSpec(Array(DataType.double), "probabilities", required=False),
        ]
    return ModelSignature(inputs=Schema(inputs), outputs=Schema(outputs))


def _log(flavor: _RawRows, name: str, **options: Any) -> tuple[str, int]:
    """Log a model in the active run. Returns its URI and its size in bytes without the package's source.

    `mlflow.spark.log_model` still makes a run artifact; this makes a logged model, as torch's does. With requirements
    given, and no trial of the example, MLflow does not run the model meanwhile (8 to 22 s).
    """
    from mlflow.models import Model as MLflowModel

    info = _guarded(
        f"log model {name}",
        lambda: MLflowModel.log(
            artifact_path=None,
            name=name,
            flavor=flavor,
            flavor_name=flavor.flavor.__name__,
            validate_serving_input=False,
            **options,
        ),
    )
    return str(info.model_uri), flavor.size_bytes


def log_classic(model: "Model", name: str, *, bundle: Bundle, scratch: Path) -> tuple[str, int]:
    """Log an MLlib model in the active run, by way of `scratch`. Returns its URI and its size in bytes."""
    import mlflow.spark

    _mlflow()
    flavor = _RawRows(mlflow.spark, "pipelines.serving.mllib", bundle)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        requirements = _requirements("pyspark", *_NEEDED)
        return _log(flavor, name, spark_model=model, dfs_tmpdir=folder, pip_requirements=requirements)


def load_classic(path: Path) -> "PipelineModel":
    """The MLlib model in a local copy of a logged model."""
    import mlflow.spark

    _mlflow()
    model: PipelineModel = _guarded(
        f"load {path}", lambda: mlflow.spark.load_model(str(path), dfs_tmpdir=str(path / "spark_tmp"))
    )
    return model


def log_torch(
    model: "torch.nn.Module",
    name: str,
    run_id: str,
    *,
    examples: Mapping[str, "np.ndarray[Any, Any]"],
    bundle: Bundle,
) -> tuple[str, int]:
    """Log a torch network as an exported program (pt2: no pickle). Returns its URI and its size in bytes.

    Args:
        model: On the CPU and in evaluation mode; its forward takes the examples in order.
        name: The model's name in MLflow.
        run_id: The run that it belongs to.
        examples: Input name to an array of shape (2, ...); the first dimension stays free.
        bundle: Kept beside the model.
    """
    import mlflow.pytorch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    mlflow_root = _mlflow()
    lists = {column.name for column in bundle.contract.inputs if column.kind.startswith("sparse")}  # of any length
    free: _Specs = [
        TensorSpec(array.dtype, (-1, -1) if key in lists else (-1, *array.shape[1:]), key)
        for key, array in examples.items()
    ]
    flavor = _RawRows(mlflow.pytorch, "pipelines.serving.network", bundle)
    with mlflow_root.start_run(run_id=run_id), warnings.catch_warnings(), _no_output():
        warnings.simplefilter("ignore")
        return _log(
            flavor,
            name,
            pytorch_model=model,
            signature=ModelSignature(inputs=Schema(free)),
            input_example=tuple(examples.values()),
            serialization_format="pt2",
            pip_requirements=_requirements("torch", *_NEEDED),
        )


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


def load_torch(path: str) -> "torch.nn.Module":
    """The network in a local copy of a logged model; archives that hold pickles are refused by MLflow."""
    import mlflow.pytorch

    _mlflow()
    network: torch.nn.Module = mlflow.pytorch.load_model(path)
    return network


def download(uri: str, folder: Path) -> Path:
    """A local copy of a logged model."""
    mlflow = _mlflow()
    return Path(_guarded(f"download {uri}", lambda: mlflow.artifacts.download_artifacts(uri, dst_path=str(folder))))


@contextlib.contextmanager
def bad_request() -> Iterator[None]:
    """Make a DataError of the body one that MLflow's server answers as the client's mistake, in its own words."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

    class BadRequest(DataError, MlflowException):
        pass

    try:
        yield
    except DataError as error:
        raise BadRequest(str(error), INVALID_PARAMETER_VALUE) from None


def model_exists(uri: str) -> bool:
    """Whether MLflow still holds the model's files.

    Raises:
        TrackingError: MLflow cannot say.
    """
    from mlflow.exceptions import MlflowException

    def find() -> Any:
        try:
            return _mlflow().MlflowClient().get_logged_model(uri.removeprefix("models:/"))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    model = _guarded(f"look up {uri}", find)
    if model is None:
        return False
    location = str(model.artifact_location)
    return not location.startswith("file:") or Path(location.removeprefix("file://")).is_dir()


def champion(workload: str, *, alias: str = "champion") -> Registered | None:
    """The version that carries the alias, or None."""
    if _is_embedded() and not (lake_root() / "mlflow.db").is_file():
        return None
    from mlflow.exceptions import MlflowException

    try:
        return _registered(_mlflow().MlflowClient().get_model_version_by_alias(workload, alias))
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise TrackingError(f"MLflow at {tracking_uri()}: {one_line(str(error))}") from None


def versions(workload: str) -> list[Registered]:
    """All versions of the workload's registered model, newest first."""
    found = _mlflow().MlflowClient().search_model_versions(f"name = '{workload}'")
    return sorted((_registered(version) for version in found), key=lambda v: -v.version)


def _registered(version: "ModelVersion") -> Registered:
    tags = version.tags
    if REF_TAG not in tags:
        raise TrackingError(
            f"MLflow: model {version.name} version {version.version} was not registered by Headrace: no tag {REF_TAG}"
        )
    return Registered(
        version=int(version.version),
        ref=ModelRef.model_validate_json(tags[REF_TAG]),
        evaluation=tags.get(EVALUATION_TAG, ""),
        tags=dict(tags),
    )


def register(
    workload: str, ref: ModelRef, run_id: str, *, alias: str, evaluation: str, tags: Mapping[str, str], note: str
) -> int:
    """Make a version of the model and give it the alias. Returns the version."""
    from mlflow.exceptions import MlflowException

    client = _mlflow().MlflowClient()

    def make() -> int:
        with contextlib.suppress(MlflowException):  # it exists
            client.create_registered_model(workload)
        all_tags = {REF_TAG: ref.model_dump_json(), EVALUATION_TAG: evaluation, **tags}
        version = client.create_model_version(
            workload,
            source=ref.uri,
            run_id=run_id,
            tags=all_tags,
            description=note,
            model_id=ref.uri.removeprefix("models:/"),
        )
        client.set_registered_model_alias(workload, alias, version.version)
        return int(version.version)

    return _guarded(f"register {ref.name}", make)


def move_alias(workload: str, version: int, *, alias: str) -> None:
    """Point the alias at a version."""
    client = _mlflow().MlflowClient()
    _guarded(f"move alias {alias}", lambda: client.set_registered_model_alias(workload, alias, str(version)))


def ui_arguments() -> list[str]:
    """Arguments of `mlflow server` for the lake's own store."""
    return ["--backend-store-uri", tracking_uri(), "--default-artifact-root", (lake_root() / "mlartifacts").as_uri()]
