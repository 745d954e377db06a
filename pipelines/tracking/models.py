"""Models in MLflow's format, which take raw rows."""

import contextlib
import os
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version as installed_version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import pandas as pd
from pydantic import BaseModel, ConfigDict

import pipelines
from pipelines.errors import DataError
from pipelines.features.fitted import Bundle
from pipelines.features.raw_rows import example_row
from pipelines.tracking.store import guarded, mlflow_client, mlflow_module

if TYPE_CHECKING:
    import numpy as np
    import torch
    from mlflow.models import Model as MLflowModel
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, TensorSpec
    from pyspark.ml import Model, PipelineModel

_PACKAGE = Path(pipelines.__file__).resolve().parent
# What the modules that serve import, beside torch or pyspark.
_NEEDED = ("mlflow", "numpy", "pandas", "pyarrow", "pydantic", "pyyaml", "psutil", "xxhash", "deltalake", "pillow")
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


def log_classic(model: "Model", name: str, *, bundle: Bundle, scratch: Path) -> tuple[str, int]:
    """Log an MLlib model in the active run, by way of `scratch`. Returns its URI and its size in bytes."""
    import mlflow.spark

    mlflow_module()
    flavor = _RawRows(mlflow.spark, "pipelines.serving.mllib", bundle)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        requirements = _requirements("pyspark", *_NEEDED)
        return _log(flavor, name, spark_model=model, dfs_tmpdir=folder, pip_requirements=requirements)


def load_classic(path: Path) -> "PipelineModel":
    """The MLlib model in a local copy of a logged model."""
    import mlflow.spark

    mlflow_module()
    model: PipelineModel = guarded(
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

    mlflow_root = mlflow_module()
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


def load_torch(path: str) -> "torch.nn.Module":
    """The network in a local copy of a logged model; archives that hold pickles are refused by MLflow."""
    import mlflow.pytorch

    mlflow_module()
    network: torch.nn.Module = mlflow.pytorch.load_model(path)
    return network


def download(uri: str, folder: Path) -> Path:
    """A local copy of a logged model."""
    mlflow = mlflow_module()
    return Path(guarded(f"download {uri}", lambda: mlflow.artifacts.download_artifacts(uri, dst_path=str(folder))))


def model_exists(uri: str) -> bool:
    """Whether MLflow still holds the model's files.

    Raises:
        TrackingError: MLflow cannot say.
    """
    from mlflow.exceptions import MlflowException

    def find() -> Any:
        try:
            return mlflow_client().get_logged_model(uri.removeprefix("models:/"))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    model = guarded(f"look up {uri}", find)
    if model is None:
        return False
    location = str(model.artifact_location)
    return not location.startswith("file:") or Path(location.removeprefix("file://")).is_dir()


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


def _log(flavor: _RawRows, name: str, **options: Any) -> tuple[str, int]:
    """Log a model in the active run. Returns its URI and its size in bytes without the package's source.

    `mlflow.spark.log_model` still makes a run artifact; this makes a logged model, as torch's does. With requirements
    given, and no trial of the example, MLflow does not run the model meanwhile (8 to 22 s).
    """
    from mlflow.models import Model as MLflowModel

    info = guarded(
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


def _requirements(*packages: str) -> list[str]:
    """Pinned requirements of a model; given to MLflow, which else runs the model to infer them (8 to 22 s)."""
    return [f"{package}=={installed_version(package)}" for package in packages]


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
            ColSpec(
                DataType.double, "log_loss" if bundle.contract.label.kind == "next_token" else "score", required=False
            ),
            ColSpec(Array(DataType.double), "probabilities", required=False),
        ]
    return ModelSignature(inputs=Schema(inputs), outputs=Schema(outputs))


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield
