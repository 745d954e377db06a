"""Trials of an MLlib estimator: fits on rows that are assembled and kept once for all of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.ml import Model
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from pipelines.assemble import assemble
from pipelines.classic import checkpoints, fit, make_estimator, read_by, rows_to_fit, without_summary
from pipelines.clusters import measure_clusters
from pipelines.config import Config
from pipelines.config.learning import Estimator
from pipelines.config.tuning import with_values
from pipelines.errors import DataError, one_line
from pipelines.lake import Contract, LabelSpec, Snapshot, scratch_path
from pipelines.metrics import measure
from pipelines.predict import answers
from pipelines.session import get_session, lost_jvm, spark_progress
from pipelines.stage import Given
from pipelines.tables import read_table
from pipelines.tune.folds import Pair, kept_pairs
from pipelines.tune.search import Attempt, Objective, Pruned


@contextmanager
def objective(given: Given, wanted: Estimator, train: Snapshot, validation: Snapshot | None) -> Iterator[Objective]:
    """How good the estimator is with an attempt's parameters, while the body runs; attempts may run in threads."""
    config = given.config
    assert config.tune is not None and train.contract is not None, "declared with a tune section; a feature table"
    spark, contract, name = get_session(config), read_by(wanted, train.contract), wanted.estimator
    keep = [column.name for column in contract.columns if column.kind in ("row_id", "label")]
    tables = [
        None if table is None else assemble(read_table(spark, table), contract, estimator=name, keep=keep)
        for table in (train, validation)
    ]
    assert tables[0] is not None
    with (
        checkpoints(spark, scratch_path(config.workload)),
        spark_progress(spark, f"tune: {name}"),
        kept_pairs(tables[0], tables[1], folds=config.tune.folds, seed=config.seed) as pairs,
    ):

        def attempted(attempt: Attempt) -> float:
            estimator = with_values(wanted, attempt.params)
            try:
                return _mean(attempt, pairs, estimator, contract, config)
            except (PySparkException, Py4JError) as error:
                if lost_jvm() is not None:
                    raise  # ends the search, and is no trial of it
                raise DataError(f"{name}: {one_line(str(error), limit=300)}") from None

        yield attempted


def _mean(attempt: Attempt, pairs: list[Pair], wanted: Estimator, contract: Contract, config: Config) -> float:
    """The metric's mean over the pairs. One that stops early watches the rows that it is measured on."""
    total, weights = 0.0, contract.label.weights(config.class_weights)
    estimator = make_estimator(wanted, contract, seed=config.seed, is_weighted=bool(weights))
    for place, pair in enumerate(pairs, 1):
        model = without_summary(fit(estimator, rows_to_fit(wanted, pair.fit, pair.measure, weights)))
        total += _measured(model, pair.measure, contract.label, wanted, config.tune_metric)
        attempt.report(place, total / place, is_last=place == len(pairs))
        if attempt.is_pruned:
            raise Pruned
    return total / len(pairs)


def _measured(model: Model, rows: DataFrame, label: LabelSpec, wanted: Estimator, metric: str) -> float:
    name = wanted.estimator
    if label.kind == "none":
        measured = measure_clusters(model, rows)
    else:
        scored = answers(model.transform(rows), label, name, gives=wanted.gives, keep=["row_id", "label"])
        scored = scored.withColumns({"candidate": F.lit(name), "split": F.lit("validation")})
        measured = measure(scored, label)[name, "validation"].metrics
    if metric not in measured:
        raise DataError(
            f"{name}: wanted {metric} on the rows that are measured, seen {', '.join(measured) or 'nothing'}"
        )
    return measured[metric]


def values_as_written(given: Given, wanted: Estimator, contract: Contract) -> dict[str, Any]:
    """All parameters of the estimator as the config writes it, MLlib's defaults among them.

    Raises:
        ConfigError: MLlib refuses a value.
    """
    get_session(given.config)
    estimator = make_estimator(wanted, read_by(wanted, contract), seed=given.config.seed)
    return {param.name: value for param, value in estimator.extractParamMap().items()} | wanted.params
