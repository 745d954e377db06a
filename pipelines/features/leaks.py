"""What lets a model see its answers: an entity or a row on both sides of a split, and a feature that is the label.

Entities are looked for in the input, one reading of their columns. Rows are compared as the models see them, in the
feature tables: rows that are equal in the input are equal there. Features are tried on a sample of the training table.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from scipy.stats import rankdata

from pipelines.config import Config
from pipelines.config.split import Outcome
from pipelines.errors import DataError
from pipelines.features.fitted import Floats
from pipelines.features.sample import Sample, places
from pipelines.lake import LabelSpec, Snapshot
from pipelines.session import spark_progress

TELLS_THE_LABEL = 0.99
_FEWEST = 10  # rows of a class, or of a number, below which chance may tell the label
_BINS = 1000
_CELLS = 200_000  # rows times classes of a multilabel label that are tried
_MEASURES = {
    "binary": "AUC",
    "multilabel": "AUC of a class",
    "multiclass": "balanced accuracy",
    "real": "rank correlation",
    "count": "rank correlation",
    "survival": "rank correlation with the time",
}


@dataclass(frozen=True)
class Found:
    """What was found.

    Attributes:
        duplicates: Rows of each split that have a twin in train.
        telling: Features that tell the label, and how well.
        warnings: A line each.
    """

    duplicates: Mapping[str, int] = field(default_factory=dict)
    telling: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def check_entities(rows: DataFrame, config: Config) -> list[str]:
    """Warnings where an entity stands in two splits; one reading of the entity's columns and `_split`.

    Raises:
        DataError: `split.leaks.entities` says so.
    """
    entity, known = config.split.entity, F.lit(True)
    for name in entity:
        known = known & F.col(name).isNotNull()
    splits = F.sort_array(F.collect_set("_split"))
    twice = rows.where(known).groupBy(*entity).agg(splits.alias("splits")).where(F.size("splits") > 1)
    with spark_progress(rows.sparkSession, "features: entities"):
        seen = twice.agg(F.count(F.lit(1)).alias("num"), F.min(F.struct(*entity, "splits")).alias("first")).first()
    if not seen or not seen["num"]:
        return []
    shown = ", ".join(f"{name}={seen['first'][name]}" for name in entity)
    return _told(
        config.split.leaks.entities,
        f"split.entity: wanted each entity in one split, seen {seen['num']:,} in several, such as {shown} in "
        f"{' and '.join(seen['first']['splits'])}; cut by its hash (split.hash.by), or mend the split",
    )


def find_leaks(
    spark: SparkSession, snapshots: Mapping[str, Snapshot], sample: Sample, label: LabelSpec, config: Config
) -> Found:
    """Look for duplicates and for features that tell the label; neither reads the input.

    Args:
        spark: The session.
        snapshots: The feature table of each split.
        sample: Of the training table.
        label: What it means.
        config: The workload.

    Raises:
        DataError: `split.leaks` says so.
    """
    outcomes, warnings = config.split.leaks, []
    and_label = " and in the label" if label.has_column else ""
    duplicates = {} if outcomes.duplicates == "off" else count_duplicates(spark, snapshots, config)
    for split, num in duplicates.items():
        warnings += _told(
            outcomes.duplicates,
            f"{num:,} rows of {split} ({num / snapshots[split].rows:.2%}) equal a training row in every feature{and_label}; "
            "cut by what they have in common (split.hash.by, split.entity), or drop them from the source",
        )
    telling = {} if outcomes.label == "off" else telling_features(sample, label)
    for name, value in telling.items():
        warnings += _told(
            outcomes.label,
            f"features: {name!r} alone tells the label: {_MEASURES[label.kind]} {value:.4f}, suspicious above "
            f"{TELLS_THE_LABEL}; leave it out unless it is known when the model is asked",
        )
    return Found(duplicates, telling, tuple(warnings))


def count_duplicates(spark: SparkSession, snapshots: Mapping[str, Snapshot], config: Config) -> dict[str, int]:
    """For each split but train, rows that equal a training row in every feature and in the label, where there are some.

    One shuffle of a hash a row. Target encoding, which gives a training row other numbers, is left out.
    """
    encoded = {name for name, group in config.features.inputs.items() if any(s.name == "target" for s in group.steps)}
    contract = snapshots["train"].contract
    assert contract is not None
    compared = [column.name for column in contract.inputs if column.name not in encoded]
    if not compared:
        return {}
    row = F.xxhash64(*compared, *(c.name for c in contract.columns if c.kind == "label")).alias("row")
    # The files themselves: Delta's log would take longer than a small table.
    schema = spark.read.parquet(str(snapshots["train"].paths()[0])).schema
    parts = [
        spark.read.schema(schema).parquet(*map(str, table.paths())).select(row, F.lit(split).alias("split"))
        for split, table in snapshots.items()
    ]
    rows = reduce(DataFrame.unionAll, parts)
    others = [split for split in snapshots if split != "train"]
    counts = rows.groupBy("row").agg(*[F.count_if(F.col("split") == split).alias(split) for split in snapshots])
    found = counts.where("train > 0").agg(*[F.sum(split).alias(split) for split in others]).first()
    return {split: int(found[split]) for split in others if found and found[split]}


def telling_features(sample: Sample, label: LabelSpec) -> dict[str, float]:
    """The places of dense inputs and ids that alone tell the label, with how well they do.

    A number ranks the rows as it is. An id, and for several classes a number's bin, is looked up in one half of the
    rows and tried on the other, so that ids that are all different tell nothing. A multilabel label is told by what
    tells one of its classes.
    """
    y = sample.whole("label").astype(np.float64) if sample.files and label.has_column else np.empty(0)
    kind, told_apart = label.kind, [y]
    if label.kind == "survival":
        told_apart = [y[:, 0]]
    if label.kind == "multilabel":
        y = y[: max(_FEWEST, _CELLS // len(label.classes))]
        kind, told_apart = "binary", list(y.T)
    if not label.is_number:
        told_apart = [of for of in told_apart if len(of) and np.unique(of, return_counts=True)[1].min() >= _FEWEST]
    if len(y) < _FEWEST or not told_apart:
        return {}
    found = {}
    for column in sample.columns:
        if column.kind in ("dense", "ids"):
            values = sample.whole(column.name)[: len(y)].reshape(len(y), -1)
            for place, name in enumerate(places(column)):
                told = max(_strength(values[:, place], of, kind, is_id=column.kind == "ids") for of in told_apart)
                if told > TELLS_THE_LABEL:
                    found[name] = told
    return found


def _strength(values: npt.NDArray[Any], y: Floats, kind: str, *, is_id: bool) -> float:
    if kind == "multiclass":
        return _balanced_accuracy(values if is_id else _binned(values), y.astype(np.int64))
    if is_id:
        values, y = _looked_up(values, y)
    return _auc(values, y) if kind == "binary" else _rank_correlation(values, y)


def _auc(score: Floats, y: Floats) -> float:
    """Area under the ROC curve of the score or of its opposite; 0 without both classes."""
    positive = y.sum()
    if not 0 < positive < len(y):
        return 0.0
    wins = rankdata(score)[y > 0].sum() - positive * (positive + 1) / 2
    area = float(wins / (positive * (len(y) - positive)))
    return max(area, 1 - area)


def _rank_correlation(values: Floats, y: Floats) -> float:
    """Spearman's, without its sign; 0 where one is constant."""
    if values.min() == values.max() or y.min() == y.max():
        return 0.0
    return abs(float(np.corrcoef(rankdata(values), rankdata(y))[0, 1]))


def _looked_up(ids: npt.NDArray[Any], y: Floats) -> tuple[Floats, Floats]:
    """For every second row the mean label that the others have with its id, and its own label."""
    _, codes = np.unique(ids, return_inverse=True)
    num = np.bincount(codes[::2], minlength=codes.max() + 1)
    total = np.bincount(codes[::2], weights=y[::2], minlength=codes.max() + 1)
    mean = np.divide(total, num, out=np.full(len(num), y[::2].mean()), where=num > 0)
    return mean[codes[1::2]], y[1::2]


def _balanced_accuracy(ids: npt.NDArray[Any], y: npt.NDArray[np.int64]) -> float:
    """Mean over classes of the share of every second row whose class the others with its id mostly have."""
    _, codes = np.unique(ids, return_inverse=True)
    classes = int(y.max()) + 1
    pairs, counts = np.unique(codes[::2] * classes + y[::2], return_counts=True)
    rising = pairs[np.argsort(counts, kind="stable")]
    most = np.full(codes.max() + 1, -1)
    most[rising // classes] = rising % classes  # the last one written is the most frequent
    asked = y[1::2]
    hits = np.bincount(asked[most[codes[1::2]] == asked], minlength=classes)
    num = np.bincount(asked, minlength=classes)
    return float((hits[num > 0] / num[num > 0]).mean())


def _binned(values: Floats) -> npt.NDArray[np.int64]:
    """Bins by quantiles, at least some rows in each."""
    bins = max(2, min(_BINS, len(values) // 20))
    return np.searchsorted(np.unique(np.quantile(values, np.linspace(0, 1, bins)[1:-1])), values, side="right")


def _told(outcome: Outcome, text: str) -> list[str]:
    if outcome == "fail":
        raise DataError(text)
    return [f"warning: {text}"]
