"""Plots of an evaluation, from the small summaries that `metrics` gives."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.gate import Floats
from pipelines.metrics import Histogram

_BINS = 20


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
    """A sample of rows of a real label."""
    figure, axes = _figure(title, "true", "predicted")
    axes.scatter(label, prediction, s=4, alpha=0.3)
    limits = [float(min(label.min(), prediction.min())), float(max(label.max(), prediction.max()))]
    axes.plot(limits, limits, linestyle=":", color="gray")
    return figure


def leaderboard(rows: Sequence[tuple[str, float]], metric: str, chosen: str) -> Figure:
    """The candidates' test metric as bars, the chosen one in another colour."""
    figure, axes = _figure("Candidates on the test split", metric, "")
    names = [name for name, _ in rows]
    values = [value for _, value in rows]
    axes.barh(names, values, color=["tab:orange" if name == chosen else "tab:blue" for name in names])
    for place, value in enumerate(values):
        axes.text(value, place, f" {value:.4f}", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    return figure
