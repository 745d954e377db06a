"""A logged model on Spark: features in, predictions out, in Arrow batches.

`features.apply.transform`, then `predict`, is the one scoring path: the gate tests through it what the score stage
ships.
"""

import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
from pyspark.ml.functions import vector_to_array
from pyspark.sql import Column as SparkColumn
from pyspark.sql import DataFrame, Observation
from pyspark.sql import functions as F

from pipelines import tracking
from pipelines.arrays import as_column, to_array, to_padded
from pipelines.assemble import assemble
from pipelines.clusters import with_prediction
from pipelines.errors import LakeError
from pipelines.features.fitted import BUNDLE_FILE, Bundle
from pipelines.lake import LabelSpec
from pipelines.lake.contract import HAS_CLASS
from pipelines.recommend import ITEM_ID, USER_ID, Factors
from pipelines.tables import schema_of
from pipelines.tracking import ModelRef

if TYPE_CHECKING:
    import torch
    from pyspark.ml import PipelineModel

TIMED_ROWS = 50_000  # or tokens
_ROWS_AT_ONCE = 1 << 14  # likewise: a network's layers take as much memory for a token as for a row
_OUTPUT = "prediction double, score double, probabilities array<double>, hits double"


@dataclass(frozen=True)
class Loaded:
    """A logged model in a local copy that all nodes see."""

    ref: ModelRef
    bundle: Bundle
    path: Path

    @cached_property
    def pipeline(self) -> "PipelineModel":
        """The MLlib model, read once."""
        return tracking.load_classic(self.path)


@contextmanager
def loaded(ref: ModelRef, scratch: Path) -> Iterator[Loaded]:
    """A copy of the model's files under `scratch`, for the time of the body.

    Raises:
        TrackingError: MLflow does not hold the model.
        LakeError: The model has no bundle: it was not logged by Headrace.
    """
    folder = Path(tempfile.mkdtemp(dir=scratch))
    try:
        path = tracking.download(ref.uri, folder)
        if not (path / BUNDLE_FILE).is_file():
            raise LakeError(f"{ref.uri}: wanted {BUNDLE_FILE} beside the model, seen none; train and register it anew")
        yield Loaded(ref, Bundle.load(path), path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def predict(features: DataFrame, model: Loaded, *, keep: Sequence[str]) -> DataFrame:
    """Predictions for rows as the model's features have them.

    Args:
        features: What `transform` makes of raw rows by `model.bundle.fitted`.
        model: The model.
        keep: Columns of `features` to pass through.

    Returns:
        `keep`; `prediction`, a class index, the label's value or a cluster, null where the model gives an affinity and for a
        multilabel label, whose classes are those with a probability of at least `HAS_CLASS`; `score`, which ranks rows for
        a binary label (the probability of class 1, or a margin), is that affinity or the log loss of a sequence, null for
        others; `probabilities` of the classes or clusters, null where the model has none; `hits`, the share of a
        sequence's tokens that were the most likely, null for others. A sequence's prediction is the token behind it.
    """
    if model.bundle.kind == "classic":
        return apply_classic(features, model.pipeline, model.bundle, keep=keep)
    run = _TorchBatches(str(model.path), model.bundle, tuple(keep))
    if model.bundle.contract.row_outputs > 1:  # a row costs more than its way to another core
        features = features.repartition(features.sparkSession.sparkContext.defaultParallelism)
    return features.mapInArrow(run, f"{schema_of(features.select(*keep))}, {_OUTPUT}")


def raw_outputs(features: DataFrame, model: Loaded, *, keep: Sequence[str]) -> DataFrame:
    """What a network gives for each row, as `outputs` of type array<float> behind `keep`; see `predict`."""
    run = _RawBatches(str(model.path), model.bundle, tuple(keep))
    return features.mapInArrow(run, f"{schema_of(features.select(*keep))}, outputs array<float>")


def apply_classic(features: DataFrame, model: "PipelineModel", bundle: Bundle, *, keep: Sequence[str]) -> DataFrame:
    """Predictions of an MLlib model, see `predict`."""
    scored = model.transform(assemble(features, bundle.contract, estimator=bundle.name, keep=keep))
    return answers(scored, bundle.contract.label, bundle.name, gives=bundle.gives, keep=keep)


def answers(scored: DataFrame, label: LabelSpec, name: str, *, gives: str, keep: Sequence[str]) -> DataFrame:
    """What the `transform` of an MLlib model of that name made, in the columns of `predict`."""
    prediction = F.col("prediction").cast("double")
    probabilities: SparkColumn = F.lit(None).cast("array<double>")
    score: SparkColumn = F.lit(None).cast("double")
    scored = with_prediction(scored)
    if "probability" in scored.columns:
        probabilities = vector_to_array(F.col("probability"))
    if name == "ALS":  # it has nothing to say, NaN, of a user or an item that is not in the vocabulary
        prediction = F.nanvl(prediction, F.lit(0.0 if gives == "affinity" else label.mean))
    if gives == "affinity":
        prediction, score = F.lit(None).cast("double"), prediction
    if label.kind == "binary":
        ranks = "probability" if "probability" in scored.columns else "rawPrediction"
        score = vector_to_array(F.col(ranks))[1]
    return scored.select(
        *keep,
        prediction.alias("prediction"),
        score.alias("score"),
        probabilities.alias("probabilities"),
        F.lit(None).cast("double").alias("hits"),
    )


def factors(chosen: DataFrame, model: Loaded) -> Factors:
    """The vectors of users and items: ALS's own, or those that a network makes of one row of each.

    Args:
        chosen: What `choices` makes of raw rows by `model.bundle.fitted`.
        model: One that has them.
    """
    if model.bundle.kind == "classic":
        als: Any = model.pipeline.stages[-1]
        vector = F.col("features").alias("vector")
        users, items = (
            table.select(F.col("id").cast("bigint").alias("_id"), vector)
            for table in (als.userFactors, als.itemFactors)
        )
        return Factors(users, items)
    inputs = F.struct(*[column.name for column in model.bundle.contract.inputs])
    width, parts = F.expr("div(size(outputs) - 1, 2)"), []
    for start, number in ((F.lit(2), USER_ID), (width + 2, ITEM_ID)):
        rows = chosen.where(F.col(number) > 0).groupBy(F.col(number).alias("_id"))
        one = rows.agg(F.min_by(inputs, "row_id").alias("row")).select("_id", "row.*")
        outputs = raw_outputs(one, model, keep=["_id"])
        parts.append(outputs.select("_id", F.slice("outputs", start, width).alias("vector")))
    return Factors(*parts)


def readable(scored: DataFrame, bundle: Bundle, keep: Sequence[str]) -> DataFrame:
    """Predictions in the label's own terms: the class's value instead of its index, and its probability; or the values of
    all classes that a multilabel row is said to have; of a sequence the token behind it, and its own log loss.
    """
    label = bundle.contract.label
    if bundle.gives == "affinity":
        return scored.select(*keep, "score")
    if label.is_number:
        return scored.select(*keep, "prediction")
    names = F.array(*[F.lit(name) for name in label.classes])
    if label.kind == "multilabel":
        chosen = F.zip_with(names, "probabilities", lambda name, share: F.when(share >= HAS_CLASS, name))
        return scored.select(*keep, F.array_compact(chosen).alias("prediction"), "probabilities")
    place = F.col("prediction").cast("int")
    if label.kind == "none":
        return scored.select(
            *keep, place.alias("prediction"), F.get("probabilities", place).alias("probability"), "probabilities"
        )
    return scored.select(
        *keep,
        F.get(names, place).alias("prediction"),
        F.get("probabilities", place).alias("probability"),
        F.col("score").alias("log_loss" if label.kind == "next_token" else "score"),
        "probabilities",
    )


def measure_speed(features: DataFrame, model: Loaded, *, num_rows: int) -> float:
    """Rows scored a second: from features in memory to predictions that are thrown away, `TIMED_ROWS` or so of them.

    The model has scored before, so that its workers and classes are there. Reading, the transform and writing, which
    the models share, are not in it.

    Args:
        features: Rows that are cached; fewer are taken several times, more are sampled.
        model: The model.
        num_rows: How many they are.
    """
    wanted = max(1, TIMED_ROWS // model.bundle.contract.row_outputs)
    if num_rows > wanted:
        rows = features.sample(wanted / num_rows, seed=0)
    else:
        rows = features.withColumn("_copy", F.explode(F.array_repeat(F.lit(0), -(-wanted // max(num_rows, 1)))))
    scored = predict(rows, model, keep=["row_id"])
    seen = Observation()
    started = time.monotonic()
    scored.observe(seen, F.count(F.lit(1)).alias("rows")).write.format("noop").mode("overwrite").save()
    return float(seen.get["rows"] / (time.monotonic() - started))


class _TorchBatches:
    """Runs on Spark's Python workers; loads the network once a process."""

    _networks: ClassVar[dict[str, "torch.nn.Module"]] = {}

    def __init__(self, path: str, bundle: Bundle, keep: tuple[str, ...]) -> None:
        self.path, self.contract, self.gives, self.keep = path, bundle.contract, bundle.gives, keep

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import torch

        torch.set_num_threads(1)  # one task a core already
        if self.path not in self._networks:
            self._networks[self.path] = tracking.load_torch(self.path)
        network = self._networks[self.path]
        num_rows = max(1, _ROWS_AT_ONCE // self.contract.row_outputs)
        with torch.inference_mode():
            for batch in batches:
                for part in (batch.slice(start, num_rows) for start in range(0, batch.num_rows, num_rows)):
                    outputs = network(*[torch.from_numpy(array) for array in self._inputs(part)])
                    yield self._answer(part, outputs.numpy())

    def _inputs(self, batch: pa.RecordBatch) -> Iterator[np.ndarray[Any, Any]]:
        for column in self.contract.inputs:
            convert = to_padded if column.kind.startswith("sparse") else to_array
            array = convert(batch.column(column.name), column, where="score")
            yield array if array.flags.writeable else array.copy()

    def _answer(self, batch: pa.RecordBatch, outputs: np.ndarray[Any, Any]) -> pa.RecordBatch:
        label: LabelSpec = self.contract.label
        outputs = outputs.astype(np.float64)
        nothing = pa.nulls(batch.num_rows, pa.float64())
        prediction, score, hits = pa.array(outputs[:, 0]), nothing, nothing
        probabilities = pa.nulls(batch.num_rows, pa.list_(pa.float64()))
        if label.kind == "next_token":
            score, hits, outputs = pa.array(outputs[:, 0]), pa.array(outputs[:, 1]), outputs[:, 2:]
        if not label.is_number:
            prediction = nothing if label.kind == "multilabel" else pa.array(outputs.argmax(axis=1).astype(np.float64))
            probabilities = as_column(outputs)
        if label.kind == "binary":
            score = pa.array(outputs[:, 1])
        if self.gives == "affinity":
            prediction, score = nothing, prediction
        columns = [*[batch.column(name) for name in self.keep], prediction, score, probabilities, hits]
        return pa.RecordBatch.from_arrays(columns, [*self.keep, "prediction", "score", "probabilities", "hits"])


class _RawBatches(_TorchBatches):
    """The network's outputs as they are."""

    def _answer(self, batch: pa.RecordBatch, outputs: np.ndarray[Any, Any]) -> pa.RecordBatch:
        columns = [*[batch.column(name) for name in self.keep], as_column(outputs)]
        return pa.RecordBatch.from_arrays(columns, [*self.keep, "outputs"])
