"""The names kept as data are those of the libraries."""

import inspect

import pyspark.ml.classification
import pyspark.ml.clustering
import pyspark.ml.recommendation
import pyspark.ml.regression
import torch
from pyspark.ml.param import Param

from pipelines.config import catalog
from pipelines.models.names import network_path

COLUMNS = ("Col", "validationIndicatorCol")
OURS = {"coldStartStrategy"}
MODULES = (pyspark.ml.classification, pyspark.ml.regression, pyspark.ml.clustering, pyspark.ml.recommendation)


def test_estimators_and_their_parameters() -> None:
    for name, params in catalog.ESTIMATORS.items():
        cls = next(getattr(module, name) for module in MODULES if hasattr(module, name))
        theirs = {key for key in dir(cls) if isinstance(getattr(cls, key, None), Param) and not key.endswith(COLUMNS)}
        assert set(params) == theirs - OURS, name


def test_classifiers_without_weights_of_rows() -> None:
    for name in catalog.ESTIMATORS.keys() - catalog.REGRESSORS - catalog.CLUSTERERS:
        taken = inspect.signature(getattr(pyspark.ml.classification, name)).parameters
        assert ("weightCol" in taken) == (name not in catalog.UNWEIGHTED), name


def test_regressors() -> None:
    assert {n for n in catalog.ESTIMATORS if hasattr(pyspark.ml.regression, n)} | {"ALS"} == catalog.REGRESSORS


def test_clusterers() -> None:
    assert {n for n in catalog.ESTIMATORS if hasattr(pyspark.ml.clustering, n)} == catalog.CLUSTERERS


def test_optimizers_and_their_parameters() -> None:
    for name, params in catalog.OPTIMIZERS.items():
        assert set(params) <= set(inspect.signature(getattr(torch.optim, name)).parameters), name


def test_schedules_and_their_parameters() -> None:
    for name, params in catalog.SCHEDULES.items():
        assert set(params) <= set(inspect.signature(getattr(torch.optim.lr_scheduler, name)).parameters), name


def test_networks_and_their_parameters() -> None:
    for name, params in catalog.NETWORKS.items():
        module, _, cls = network_path(name).partition(":")
        taken = inspect.signature(getattr(__import__(module, fromlist=[cls]), cls)).parameters
        assert set(params) == set(taken) - {"contract", "outputs"}, name
