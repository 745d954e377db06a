"""MLflow's client and where it keeps things."""

import logging
import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from pipelines.config.load import lake_root
from pipelines.errors import TrackingError, is_full_disk, one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")


def tracking_uri() -> str:
    """Where runs go."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _embedded_uri()


def _embedded_uri() -> str:
    return f"sqlite:///{lake_root() / 'mlflow.db'}"


def is_embedded() -> bool:
    """Whether they go into the lake's own store."""
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


def mlflow_module() -> ModuleType:
    """mlflow itself, imported now and told where the store is."""
    warnings.filterwarnings("ignore", module=r"mlflow|pydantic|google")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what matters is raised as well
    mlflow.set_tracking_uri(tracking_uri())
    return mlflow


def mlflow_client() -> "MlflowClient":
    """MLflow's client of the store."""
    found: MlflowClient = mlflow_module().MlflowClient()
    return found


def create_store() -> None:
    """Make the embedded store's tables, which takes seconds the first time."""
    if is_embedded():
        lake_root().mkdir(parents=True, exist_ok=True)
    mlflow_client().search_experiments(max_results=1)


def guarded(what: str, call: Callable[[], T]) -> T:
    """`call()`, with MLflow's errors as ours."""
    from mlflow.exceptions import MlflowException

    try:
        return call()
    except MlflowException as error:
        if is_full_disk(str(error)):
            raise
        raise TrackingError(f"MLflow at {tracking_uri()}: {what}: {one_line(str(error))}") from None


def ui_arguments() -> list[str]:
    """Arguments of `mlflow server` for the lake's own store."""
    return ["--backend-store-uri", tracking_uri(), "--default-artifact-root", (lake_root() / "mlartifacts").as_uri()]
