"""The registry: a workload's versions, and which of them is the champion."""

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from pipelines.config.load import lake_root
from pipelines.errors import TrackingError, one_line
from pipelines.tracking.models import ModelRef
from pipelines.tracking.store import guarded, is_embedded, mlflow_client, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

_REF_TAG, _EVALUATION_TAG = "headrace.model", "headrace.evaluation"


class Registered(BaseModel):
    """A version of a workload's registered model."""

    model_config = ConfigDict(frozen=True)

    version: int
    ref: ModelRef
    evaluation: str
    tags: dict[str, str] = {}


def champion(workload: str, *, alias: str = "champion") -> Registered | None:
    """The version that carries the alias, or None."""
    if is_embedded() and not (lake_root() / "mlflow.db").is_file():
        return None
    from mlflow.exceptions import MlflowException

    try:
        return _registered(mlflow_client().get_model_version_by_alias(workload, alias))
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise TrackingError(f"MLflow at {tracking_uri()}: {one_line(str(error))}") from None


def versions(workload: str) -> list[Registered]:
    """All versions of the workload's registered model, newest first."""
    found = mlflow_client().search_model_versions(f"name = '{workload}'")
    return sorted((_registered(version) for version in found), key=lambda v: -v.version)


def _registered(version: "ModelVersion") -> Registered:
    tags = version.tags
    if _REF_TAG not in tags:
        raise TrackingError(
            f"MLflow: model {version.name} version {version.version} was not registered by Headrace: no tag {_REF_TAG}"
        )
    return Registered(
        version=int(version.version),
        ref=ModelRef.model_validate_json(tags[_REF_TAG]),
        evaluation=tags.get(_EVALUATION_TAG, ""),
        tags=dict(tags),
    )


def register(
    workload: str, ref: ModelRef, run_id: str, *, alias: str, evaluation: str, tags: Mapping[str, str], note: str
) -> int:
    """Make a version of the model and give it the alias. Returns the version."""
    from mlflow.exceptions import MlflowException

    client = mlflow_client()

    def make() -> int:
        with contextlib.suppress(MlflowException):  # it exists
            client.create_registered_model(workload)
        all_tags = {_REF_TAG: ref.model_dump_json(), _EVALUATION_TAG: evaluation, **tags}
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

    return guarded(f"register {ref.name}", make)


def move_alias(workload: str, version: int, *, alias: str) -> None:
    """Point the alias at a version."""
    client = mlflow_client()
    guarded(f"move alias {alias}", lambda: client.set_registered_model_alias(workload, alias, str(version)))
