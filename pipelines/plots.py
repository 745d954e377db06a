"""Plots of an evaluation, from the small summaries that `metrics` gives."""

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.bootstrap import Floats
from pipelines.clusters import Clusters
from pipelines.importances import Importances
from pipelines.metrics import Histogram

_BINS = 20
MOST_FEATURES = 25
MOST_CLUSTERS = 16


def _figure(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def confusion_matrix(counts: np.ndarray[Any, Any], classes: Sequence[str], title: str) -> Figure:
    """Counts by true and predicted class, shaded by the share of the true class."""
    figure, axes = _figure(title, "predicted", "true")
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    places = range(len(classes))
    axes.set_xticks(places, classes, rotation=45 if len(classes) > 10 else 0)
    axes.set_yticks(places, classes)
    if len(classes) <= 20:
        for i in places:
            for j in places:
                color = "white" if shares[i, j] > 0.5 else "black"
                axes.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", color=color, fontsize=8)
    return figure


def roc(histograms: Mapping[str, Histogram]) -> Figure:
    """The ROC curve of each model."""
    figure, axes = _figure("ROC on the test split", "false positive rate", "true positive rate")
    for name, histogram in histograms.items():
        axes.plot(_share_above(histogram.negative), _share_above(histogram.positive), label=name)
    axes.plot([0, 1], [0, 1], linestyle=":", color="gray")
    axes.legend()
    return figure


def kolmogorov_smirnov(histogram: Histogram, title: str) -> Figure:
    """The share of each class at or above a score, and where the two are widest apart."""
    figure, axes = _figure(f"{title}: Kolmogorov-Smirnov", "score", "share of the class at or above")
    score = np.linspace(1.0, 0.0, len(histogram.mean) + 1)
    positive, negative = _share_above(histogram.positive), _share_above(histogram.negative)
    axes.plot(score, positive, label="class 1")
    axes.plot(score, negative, label="class 0")
    widest = int(np.abs(positive - negative).argmax())
    axes.vlines(score[widest], negative[widest], positive[widest], color="black", linestyle=":")
    gap = abs(positive[widest] - negative[widest])
    axes.text(score[widest], (positive[widest] + negative[widest]) / 2, f" {gap:.3f} at {score[widest]:.2f}")
    axes.legend()
    return figure


def _share_above(counts: Floats) -> Floats:
    """Share of the rows at or above each bin, from the highest bin down, beginning with 0."""
    total = max(counts.sum(), 1.0)
    return np.concatenate([[0.0], np.cumsum(counts[::-1]) / total])


def calibration(histograms: Mapping[str, Histogram], ylabel: str) -> Figure:
    """Mean score against what happened, in 20 bins of equal width."""
    figure, axes = _figure("Calibration on the test split", "mean score", ylabel)
    axes.plot([0, 1], [0, 1], linestyle=":", color="gray")
    for name, histogram in histograms.items():
        num = histogram.positive + histogram.negative
        groups = np.array_split(np.arange(len(num)), _BINS)
        filled = [group for group in groups if num[group].sum() > 0]
        score = [float(np.nansum(histogram.mean[group] * num[group]) / num[group].sum()) for group in filled]
        share = [float(histogram.positive[group].sum() / num[group].sum()) for group in filled]
        axes.plot(score, share, marker="o", label=name)
    axes.legend()
    return figure


def score_distribution(histogram: Histogram, names: tuple[str, str], title: str) -> Figure:
    """Rows by score, apart for the two kinds of rows."""
    figure, axes = _figure(title, "score", "rows")
    edges = np.linspace(0.0, 1.0, 2 * _BINS + 1)
    for counts, name in ((histogram.negative, names[0]), (histogram.positive, names[1])):
        heights = [part.sum() for part in np.array_split(counts, 2 * _BINS)]
        axes.stairs(heights, edges, fill=True, alpha=0.5, label=name)
    axes.legend()
    return figure


def predicted_against_true(label: Floats, prediction: Floats, title: str) -> Figure:
    """A sample of rows of a label that is a number."""
    figure, axes = _figure(title, "true", "predicted")
    axes.scatter(label, prediction, s=4, alpha=0.3)
    limits = [float(min(label.min(), prediction.min())), float(max(label.max(), prediction.max()))]
    axes.plot(limits, limits, linestyle=":", color="gray")
    return figure


def losses(of_rows: Floats, title: str) -> Figure:
    """A sample of rows by their log loss."""
    figure, axes = _figure(title, "log loss of a row (nats a token)", "rows")
    axes.hist(of_rows, bins=2 * _BINS)
    axes.axvline(float(of_rows.mean()), linestyle=":", color="black", label=f"mean {of_rows.mean():.4f}")
    axes.legend()
    return figure


def importances(found: Importances, title: str) -> Figure:
    """The features that weigh most, as bars."""
    figure, axes = _figure(title, found.kind, "")
    shown = found.features[:MOST_FEATURES]
    axes.barh([feature.name for feature in shown], [feature.weight for feature in shown])
    axes.invert_yaxis()
    return figure


def clusters(found: Clusters, title: str) -> Figure:
    """The features that tell each of the largest clusters, as bars."""
    shown = sorted(found.clusters, key=lambda cluster: -cluster.rows)[:MOST_CLUSTERS]
    columns = min(len(shown), 4)
    figure = Figure(figsize=(3.2 * columns, 2.6 * math.ceil(len(shown) / columns)), layout="constrained")
    figure.suptitle(f"{title}: {found.kind}")
    panels = figure.subplots(math.ceil(len(shown) / columns), columns, squeeze=False).flat
    for axes, cluster in zip_longest(panels, shown):
        if cluster is None:
            axes.set_axis_off()
            continue
        axes.barh([feature.name for feature in cluster.features], [feature.weight for feature in cluster.features])
        axes.invert_yaxis()
        axes.set_title(f"{cluster.number}: {cluster.rows:,} rows")
    return figure


def leaderboard(candidates: Sequence[Mapping[str, Any]], metric: str, chosen: str) -> Figure:
    """The candidates' test metric as bars with its confidence interval, the chosen one in another colour."""
    figure, axes = _figure("Candidates on the test split", metric, "")
    shown = [candidate for candidate in candidates if metric in candidate["metrics"]]
    for place, candidate in enumerate(shown):
        name, value = candidate["name"], candidate["metrics"][metric]
        axes.barh(name, value, color="tab:orange" if name == chosen else "tab:blue")
        end = value
        if interval := candidate["interval"]:
            axes.hlines(place, interval["low"], interval["high"], color="black")
            end = interval["high"]
        axes.text(end, place, f" {value:,.4f}", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    return figure


def trials(values: Sequence[float | None], metric: str, title: str, importances: Mapping[str, float]) -> Figure:
    """The metric of each complete trial, trial 0 as a line across, and each parameter's importance."""
    figure = Figure(figsize=(6, 5 if not importances else 7), layout="constrained")
    axes, *below = figure.subplots(2 if importances else 1, 1, squeeze=False)[:, 0]
    axes.set(title=title, xlabel="trial", ylabel=metric)
    complete = [(number, value) for number, value in enumerate(values) if value is not None]
    axes.scatter(*zip(*complete, strict=True), s=12)
    if values[0] is not None:
        axes.axhline(values[0], linestyle=":", color="gray", label="config as written")
        axes.legend()
    for bars in below:
        bars.barh(list(importances), list(importances.values()))
        bars.set(xlabel="importance")
        bars.invert_yaxis()
    return figure
