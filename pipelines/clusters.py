"""What a clusterer found: its clusters or topics by the names of their features, and how good they are on any rows."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict
from pyspark.ml import Transformer
from pyspark.ml.clustering import GaussianMixtureModel, LDAModel
from pyspark.ml.evaluation import ClusteringEvaluator
from pyspark.ml.functions import vector_to_array
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from pipelines.assemble import VECTOR
from pipelines.bootstrap import Floats
from pipelines.features.fitted import Bundle, FittedList, FittedVector
from pipelines.importances import Feature, column_names, place_names, values_of
from pipelines.tables import kept

MOST = 10  # features of a cluster
_SPOKEN, _SPOKEN_FEATURES = 12, 4  # clusters of a line, and features of each
_TOPICS = "topicDistribution"


class Cluster(BaseModel):
    """A cluster or topic, the training rows in it, and the features that tell it from the others, strongest first."""

    model_config = ConfigDict(frozen=True)

    number: int
    rows: int
    features: list[Feature]


class Clusters(BaseModel):
    """All clusters of a model.

    Attributes:
        kind: What a feature's weight is.
    """

    model_config = ConfigDict(frozen=True)

    kind: str
    clusters: list[Cluster]

    def __str__(self) -> str:
        spoken = [
            f"{cluster.number} ({cluster.rows:,} rows) {', '.join(_short(f) for f in cluster.features[:_SPOKEN_FEATURES])}"
            for cluster in self.clusters[:_SPOKEN]
        ]
        more = len(self.clusters) - len(spoken)
        return "; ".join(spoken) + (f"; and {more} more" if more else "")


def _short(feature: Feature) -> str:
    """A word without its input, and a feature that is below the mean with a sign."""
    return ("-" if feature.weight < 0 else "") + feature.name.rpartition(": ")[2]


def find_clusters(model: Any, bundle: Bundle, train: DataFrame) -> Clusters:
    """The clusters of a fitted model, in its order.

    A topic's features are its heaviest terms with their probabilities. Those of any other cluster are the places where
    its centre is farthest from the mean of all rows; a centre along components is turned back into the places in front of
    them, so that it is read in words or columns.

    Args:
        model: The model, without its training summary.
        bundle: What goes with it.
        train: Assembled training rows.
    """
    counts = with_prediction(model.transform(train)).groupBy("prediction").count().where("prediction IS NOT NULL")
    sizes = {int(row["prediction"]): row["count"] for row in counts.collect()}
    if isinstance(model, LDAModel):
        names = list(place_names(bundle.fitted, bundle.contract, estimator=bundle.name))
        topics = model.describeTopics(MOST).orderBy("topic").collect()
        pairs = [zip(row["termIndices"], row["termWeights"], strict=True) for row in topics]
        found = [[Feature(name=names[place], weight=weight) for place, weight in topic] for topic in pairs]
        kind = "probability of a term in the topic"
    else:
        centres, shares = _centres(model, sizes)
        names, away = _unfolded(centres - shares @ centres, bundle)
        orders = np.argsort(-np.abs(away), axis=1, kind="stable")[:, :MOST].tolist()
        found = [
            [Feature(name=names[place], weight=float(row[place])) for place in order]
            for row, order in zip(away, orders, strict=True)
        ]
        kind = "distance of the centre from the mean"
    clusters = [Cluster(number=n, rows=sizes.get(n, 0), features=told) for n, told in enumerate(found)]
    return Clusters(kind=kind, clusters=clusters)


def _centres(model: Any, sizes: dict[int, int]) -> tuple[Floats, Floats]:
    """Centres, of shape (k, width), and each one's share of the rows, of shape (k,)."""
    if isinstance(model, GaussianMixtureModel):
        return np.array([gaussian.mean.toArray() for gaussian in model.gaussians]), np.array(model.weights)
    centres = np.array(model.clusterCenters())
    shares = np.array([sizes.get(number, 0) for number in range(len(centres))], dtype=np.float64)
    return centres, shares / shares.sum()


def _unfolded(away: Floats, bundle: Bundle) -> tuple[list[str], Floats]:
    """Differences in the places in front of principal components or singular vectors, by name. Shape (k, places).

    Of values in a list only those that a cluster has more of count: that a word is not there tells little.
    """
    inputs = {group.name: group for group in bundle.fitted.inputs}
    names, parts, start = list[str](), list[Floats](), 0
    for column in bundle.contract.inputs:
        group = inputs[column.input]
        own = list(column_names(column, group, estimator=bundle.name))
        part = away[:, start : start + len(own)]
        start += len(own)
        match group.whole:
            case FittedVector(components=components, width=width) if components:
                own, part = [f"{group.name}[{place}]" for place in range(width)], part @ np.array(components)
            case FittedList(components=components, category=category):
                if components:
                    own, part = [f"{group.name}: {value}" for value in values_of(category)], part @ np.array(components)
                part = np.maximum(part, 0.0)
        names += own
        parts.append(part)
    return names, np.concatenate(parts, axis=1)


def with_prediction(scored: DataFrame) -> DataFrame:
    """What a model's `transform` made; topics with the heaviest as `prediction`, and their shares as `probability`.

    A row without any term is of no topic: null.
    """
    if _TOPICS not in scored.columns:
        return scored
    shares = vector_to_array(F.col(_TOPICS))
    heaviest = F.array_position(shares, F.array_max(shares)) - 1
    prediction = F.when(F.array_max(shares) > 0, heaviest).cast("double")
    return scored.withColumns({"prediction": prediction, "probability": F.col(_TOPICS)})


def measure_clusters(model: Transformer, rows: DataFrame) -> dict[str, float]:
    """Metrics of a fitted clusterer on rows of one split.

    `silhouette` is MLlib's, by squared Euclidean distances, of topics by cosines; it is left out where all rows are in one
    cluster. `log_likelihood` is the mean of a row, of topics its lower bound; `perplexity` is exp of the negative bound a
    term (D. Blei et al., Latent Dirichlet Allocation, 2003; M. Hoffman et al., Online Learning for LDA, 2010).

    Args:
        model: Without its training summary.
        rows: Assembled.
    """
    scored = with_prediction(model.transform(rows)).where("prediction IS NOT NULL")
    with kept(scored.select("prediction", VECTOR)) as scored:
        found = {}
        if scored.select("prediction").distinct().limit(2).count() == 2:
            distance = "cosine" if isinstance(model, LDAModel) else "squaredEuclidean"
            found["silhouette"] = ClusteringEvaluator(featuresCol=VECTOR, distanceMeasure=distance).evaluate(scored)
        if isinstance(model, LDAModel):
            found["log_likelihood"] = model.logLikelihood(scored) / max(scored.count(), 1)
            found["perplexity"] = np.exp(model.logPerplexity(scored))
        elif isinstance(model, GaussianMixtureModel):
            values = scored.select(vector_to_array(F.col(VECTOR)).alias("x")).mapInArrow(
                _log_density(model), "value double"
            )
            found["log_likelihood"] = values.agg(F.avg("value")).collect()[0][0]
    return {name: float(value) for name, value in found.items() if value is not None and np.isfinite(value)}


def _log_density(model: GaussianMixtureModel) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """What gives the log density of each row of a list column, on Spark's Python workers."""
    parts = [
        (float(np.log(weight)), gaussian.mean.toArray(), gaussian.cov.toArray())
        for weight, gaussian in zip(model.weights, model.gaussians, strict=True)
        if weight > 0
    ]
    return partial(_log_densities, parts)


def _log_densities(
    parts: list[tuple[float, Floats, Floats]], batches: Iterable[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    normals = [(weight, multivariate_normal(mean, cov, allow_singular=True)) for weight, mean, cov in parts]
    for batch in filter(len, batches):
        rows = batch.column(0).flatten().to_numpy().reshape(len(batch), -1)
        each = [weight + np.atleast_1d(normal.logpdf(rows)) for weight, normal in normals]
        yield pa.RecordBatch.from_arrays([pa.array(logsumexp(each, axis=0))], ["value"])
