"""Fit MLlib estimators by name, with their own parameter names, and log them in MLflow."""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyspark.ml.classification
import pyspark.ml.clustering
import pyspark.ml.recommendation
import pyspark.ml.regression
from pyspark import SparkContext
from pyspark.errors import PySparkException
from pyspark.ml import Estimator as MLlibEstimator
from pyspark.ml import Model
from pyspark.ml.classification import OneVsRest
from pyspark.ml.clustering import DistributedLDAModel
from pyspark.ml.linalg import DenseMatrix, DenseVector
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.storagelevel import StorageLevel

from pipelines import plots, tracking
from pipelines.assemble import ITEM, USER, VECTOR, assemble, num_bins, vector_size
from pipelines.clusters import find_clusters
from pipelines.config.catalog import BINARY_ESTIMATORS, CLUSTERERS, ESTIMATORS, SURVIVAL, TREES
from pipelines.config.learning import Estimator
from pipelines.config.load import lake_root
from pipelines.errors import ConfigError, one_line
from pipelines.features.fitted import Bundle, FittedFeatures
from pipelines.importances import importances
from pipelines.lake import Contract, Snapshot, scratch_path
from pipelines.session import get_session, is_refusal, spark_progress
from pipelines.stage import Given, Made
from pipelines.tables import kept, read_table
from pipelines.tracking import ModelRef, Run

# MLlib keeps the rows in memory in a form of its own; twice, large tables end the JVM (docs/engines.md).
FIT_LEVEL = StorageLevel.DISK_ONLY
_MATRICES = ("lowerBoundsOnCoefficients", "upperBoundsOnCoefficients")
_WATCHED, _WEIGHT, _EVENT = "is_validation", "class_weight", "event"
_VECTORS = ("initialWeights", "lowerBoundsOnIntercepts", "upperBoundsOnIntercepts")


def build(given: Given) -> Made:
    """Fit each estimator of the config on the training table.

    Raises:
        ConfigError: MLlib refuses a parameter's value, or the features do not suit the estimator.
    """
    config = given.config
    spark = get_session(config)
    features = given.inputs["features"].result
    snapshots = {split: Snapshot.model_validate(value) for split, value in features["snapshots"].items()}
    snapshot = snapshots["train"]
    assert snapshot.contract is not None, "a feature table carries its contract"
    given.run.dataset(snapshot, name="features_train", context="training")
    fitted = FittedFeatures.model_validate(features["fitted"])
    weights = snapshot.contract.label.weights(config.class_weights)
    refs, lines = [], []
    with checkpoints(spark, scratch_path(config.workload)):
        for wanted in config.classic:
            contract = read_by(wanted, snapshot.contract)
            keep = [column.name for column in contract.columns if column.kind == "label"]
            with spark_progress(spark, f"classic: {wanted.estimator}"):
                estimator = make_estimator(wanted, contract, seed=config.seed, is_weighted=bool(weights))
                rows = {
                    split: assemble(
                        read_table(spark, snapshots[split]), contract, estimator=wanted.estimator, keep=keep
                    )
                    for split in ("train", *(["validation"] if wanted.stops_early else []))
                }
                model, seconds = _fit(estimator, rows_to_fit(wanted, rows["train"], rows.get("validation"), weights))
            bundle = Bundle(name=wanted.estimator, kind="classic", gives=wanted.gives, fitted=fitted, contract=contract)
            refs.append(_log(model, wanted, given, bundle, snapshot, seconds))
            lines.append(f"{wanted.estimator} fitted on {snapshot.rows:,} rows in {seconds:.1f} s")
            lines += _show(model, bundle, rows["train"], given.run)
    return Made(
        rows=snapshot.rows,
        result={"models": [ref.model_dump(mode="json") for ref in refs]},
        outputs=[output for ref in refs for output in (ref.uri, ref.path)],
        lines=lines,
    )


def read_by(wanted: Estimator, contract: Contract) -> Contract:
    """The contract of the inputs that the estimator reads."""
    return contract if wanted.inputs is None else contract.of_inputs(wanted.inputs)


@contextmanager
def checkpoints(spark: SparkSession, scratch: Path) -> Iterator[None]:
    """A folder where boosted trees cut their lineage; without it, it grows with each of them until it overflows."""
    with TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder:
        spark.sparkContext.setCheckpointDir(folder)
        yield


def rows_to_fit(wanted: Estimator, train: DataFrame, watched: DataFrame | None, weights: Sequence[float]) -> DataFrame:
    """What the estimator is fitted on.

    Args:
        wanted: The estimator.
        train: With what `assemble` makes for the estimator and, where there is one, `label`.
        watched: Likewise, the rows on which it stops early, where it does.
        weights: Of each class; empty where all weigh the same.
    """
    rows = train.select(*(name for name in ("label", VECTOR, USER, ITEM) if name in train.columns))
    if wanted.estimator == "ALS":
        return rows.where((F.col(USER) > 0) & (F.col(ITEM) > 0))  # not what is out of vocabulary, as if it were one
    if wanted.estimator in SURVIVAL:
        return rows.withColumns({"label": F.get("label", 0), _EVENT: F.get("label", 1)})
    if wanted.stops_early:
        assert watched is not None, "refused where there is no validation split"
        others = watched.select("label", VECTOR).withColumn(_WATCHED, F.lit(True))
        rows = rows.withColumn(_WATCHED, F.lit(False)).unionByName(others)
    return (
        rows.withColumn(_WEIGHT, F.get(F.array(*map(F.lit, weights)), F.col("label").cast("int"))) if weights else rows
    )


def make_estimator(
    wanted: Estimator, contract: Contract, *, seed: int, is_weighted: bool = False
) -> "MLlibEstimator[Any]":
    """The MLlib estimator of a config entry.

    The config's seed is set where the estimator takes one, `maxBins` is raised to the widest vocabulary, and a
    generalized linear model of a count is Poisson's unless told otherwise. One that knows two classes learns each of
    several against the rest.

    Raises:
        ConfigError: MLlib refuses a value.
    """
    name = wanted.estimator
    modules = (pyspark.ml.classification, pyspark.ml.regression, pyspark.ml.clustering, pyspark.ml.recommendation)
    params = {key: _value(key, value) for key, value in wanted.params.items()}
    if "seed" in ESTIMATORS[name]:
        params.setdefault("seed", seed)
    if name in SURVIVAL:
        params["censorCol"] = _EVENT  # 1 where the event was seen, in spite of its name
    if name in TREES:
        params["maxBins"] = max(params.get("maxBins", 32), num_bins(contract))
    if name == "GeneralizedLinearRegression" and contract.label.kind == "count":
        params.setdefault("family", "poisson")
    if wanted.stops_early:
        params["validationIndicatorCol"] = _WATCHED
    columns: dict[str, Any] = {"featuresCol": VECTOR} | ({} if name in CLUSTERERS else {"labelCol": "label"})
    if name == "ALS":
        columns = {"ratingCol": "label", "userCol": USER, "itemCol": ITEM}
    if is_weighted:
        columns["weightCol"] = _WEIGHT
    try:
        estimator: Any = next(getattr(m, name) for m in modules if hasattr(m, name))(**columns, **params)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"classic: {name}: {one_line(str(error))}") from None
    size = vector_size(contract, estimator=name)
    layers = wanted.params.get("layers")
    if layers and (layers[0] != size or layers[-1] != len(contract.label.classes)):
        raise ConfigError(
            f"classic: {name}: layers: wanted {size} inputs first and {len(contract.label.classes)} classes last, seen "
            f"{layers}"
        )
    if name in BINARY_ESTIMATORS and contract.label.kind == "multiclass":
        estimator = OneVsRest(classifier=estimator, **columns)
    found: MLlibEstimator[Any] = estimator
    return found


def _value(key: str, value: Any) -> Any:
    if key in _MATRICES:
        rows = [[float(x) for x in row] for row in value]
        return DenseMatrix(len(rows), len(rows[0]), [x for row in rows for x in row], isTransposed=True)
    return DenseVector(value) if key in _VECTORS else value


def fit(estimator: "MLlibEstimator[Any]", rows: DataFrame) -> Model:
    """Fit on what `rows_to_fit` gives, which MLlib reads many times: whoever calls keeps them, by `FIT_LEVEL`.

    Raises:
        ConfigError: MLlib refuses a parameter's value, or the features do not suit the estimator.
    """
    try:
        model: Model = estimator.fit(rows)
    except PySparkException as error:
        if is_refusal(error):
            raise ConfigError(
                f"classic: {type(estimator).__name__}: MLlib refuses: {one_line(str(error), limit=300)}"
            ) from None
        raise
    return _local(model, estimator) if isinstance(model, DistributedLDAModel) else model


def _local(model: DistributedLDAModel, estimator: "MLlibEstimator[Any]") -> Model:
    """The topics alone, since the model that Expectation-Maximization leaves holds the training rows."""
    local: Any = model.toLocal()  # which forgets the parameters, and a setter is not told to the JVM at once
    local.setFeaturesCol(VECTOR).setSeed(estimator.getOrDefault("seed"))._transfer_params_to_java()
    found: Model = local
    return found


def without_summary(model: Model) -> Model:
    """The model without its training summary, whose session cannot be sent to where the model is applied."""
    if getattr(model, "hasSummary", False):
        java: Any = model._java_obj  # type: ignore[attr-defined]
        java.setSummary(SparkContext._active_spark_context._jvm.scala.Option.empty())  # type: ignore[union-attr]
    return model


def _fit(estimator: "MLlibEstimator[Any]", rows: DataFrame) -> "tuple[Model, float]":
    """Fit on rows that are kept meanwhile."""
    with kept(rows, level=FIT_LEVEL) as rows:
        started = time.monotonic()
        return fit(estimator, rows), time.monotonic() - started


def _log(model: Model, wanted: Estimator, given: Given, bundle: Bundle, snapshot: Snapshot, seconds: float) -> ModelRef:
    """Save the model under the lake and log it in MLflow."""
    name = wanted.estimator
    path = lake_root() / "models" / given.config.workload / name
    shutil.rmtree(path, ignore_errors=True)
    model.write().overwrite().save(str(path))  # type: ignore[attr-defined]
    given.run.params({f"{name}.{key}": value for key, value in wanted.params.items()})
    given.run.metrics({f"{name}/fit_seconds": seconds})
    uri, size = tracking.log_classic(model, name, bundle=bundle, scratch=scratch_path(given.config.workload))
    return ModelRef(
        name=name,
        kind="classic",
        uri=uri,
        path=str(path),
        size_bytes=size,
        snapshot=snapshot.digest,
        features=bundle.fitted.digest,
        fit_seconds=round(seconds, 3),
    )


def _show(model: Model, bundle: Bundle, train: DataFrame, run: Run) -> list[str]:
    """Keep in MLflow what the model makes of each feature, or the clusters that it found; these also as a line."""
    name = bundle.name
    if name in CLUSTERERS:
        clusters = find_clusters(without_summary(model), bundle, train)
        run.json(f"clusters/{name}.json", clusters.model_dump(mode="json"))
        run.figure(f"clusters/{name}.png", plots.clusters(clusters, name))
        return [f"{name}: {clusters}"]
    if found := importances(model, name, bundle.fitted, bundle.contract):
        run.json(f"importances/{name}.json", found.model_dump(mode="json"))
        run.figure(f"importances/{name}.png", plots.importances(found, name))
    return []
