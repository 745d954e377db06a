"""The data card of the raw table: what its columns hold, and how that drifted since the version before.

Rows that come to a table are summarized alone and merged with the card of the rows that are there, which so are not
read again: counts and moments add up (Chan, Golub and LeVeque 1983), distinct values by HyperLogLog sketches
(Flajolet et al. 2007, Apache DataSketches), and a distribution is its 101 percentiles, whose mixture is that of the
distribution functions. Percentiles and most frequent values are those of a sample, the rows whose `row_id`, a hash, ends in
some zeros.
"""

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from scipy.spatial.distance import jensenshannon

from pipelines.lake.contract import Frozen

SAMPLE_BYTES = 64 << 20  # raw bytes that the sample looks at, at the least
TOP = 50  # most frequent values that a card keeps
COLUMNS_AT_ONCE = 40  # columns of one aggregation; each column is read once
_GRID = np.linspace(0, 1, 101)
_HLL_LOG2 = 10  # registers of a sketch, 1 kB: 3 % standard error
_TEXT_CHARS = 100
_BINS = 20
_LEAST_SHARE = 1e-4  # of an empty bin, where a logarithm is taken

Floats = npt.NDArray[np.float64]


class ColumnCard(Frozen):
    """What a column holds.

    Attributes:
        type: As declared.
        present: Rows with a value.
        distinct: Distinct values, approximately.
        sketch: HyperLogLog of the values, in base64.
        mean: Like all that follows, of numbers, of dates and timestamps in seconds since 1970, of lengths of lists and
            bytes; None for text.
        std: Population standard deviation.
        quantiles: The percentiles 0 to 100, from the sample.
        top: The most frequent texts, cut to 100 characters, and their rows, from the sample.
    """

    name: str
    type: str
    present: int
    distinct: int
    sketch: str
    min: float | None = None
    max: float | None = None
    mean: float | None = None
    std: float | None = None
    quantiles: tuple[float, ...] = ()
    top: tuple[tuple[str, int], ...] = ()


class Drift(Frozen):
    """How far a column moved.

    Attributes:
        missing: Change of the missing share.
        psi: Population stability index over the tenths of the rows before, or their most frequent values; above 0.2 is
            commonly called a shift. None where the column was empty.
        js: Jensen-Shannon divergence in bits, for text.
    """

    name: str
    missing: float
    psi: float | None
    js: float | None


class Card(Frozen):
    """What a table holds.

    Attributes:
        sampled: One in so many rows was looked at for percentiles and most frequent values.
        drift: Of the rows that came last against those of the version before.
    """

    rows: int
    columns: tuple[ColumnCard, ...]
    sampled: int = 1
    drift: tuple[Drift, ...] = ()

    def __getitem__(self, name: str) -> ColumnCard:
        """The column of that name."""
        return next(column for column in self.columns if column.name == name)

    def followed_by(self, more: "Card") -> "Card":
        """The card of the rows of both, of the same columns; the sketches of `more` are those of both already."""
        columns = tuple(_merge(a, b) for a, b in zip(self.columns, more.columns, strict=True))
        return Card(rows=self.rows + more.rows, columns=columns, sampled=max(self.sampled, more.sampled))

    def drift_from(self, before: "Card") -> tuple[Drift, ...]:
        """How far each column moved that was there before with the same type."""
        known = {column.name: column for column in before.columns}
        pairs = [(known[now.name], now) for now in self.columns if now.name in known]
        return tuple(
            _drift(then, before.rows, now, self.rows) for then, now in pairs if then.type == now.type and self.rows
        )


def make_card(rows: DataFrame, columns: Mapping[str, str], *, num_bytes: int, last: Card | None = None) -> Card:
    """Summarize `rows`, which have the declared columns and `row_id`, in one reading of all columns and one of texts.

    Args:
        rows: Those that came.
        columns: The declared columns and their types.
        num_bytes: Of the raw files that they come from.
        last: The card of the rows that they are added to, whose sketches are carried on.
    """
    zeros = max(0, int(math.log2(max(num_bytes, 1) / SAMPLE_BYTES)))
    sampled = F.col("row_id").bitwiseAND(F.lit((1 << zeros) - 1)) == 0
    sketches = {column.name: column.sketch for column in last.columns} if last else {}
    names = list(columns)
    facts: dict[str, Any] = {}
    for first in range(0, len(names), COLUMNS_AT_ONCE):
        asked = [F.count(F.lit(1)).alias("rows")]
        for place, name in enumerate(names[first : first + COLUMNS_AT_ONCE], first):
            asked += _facts(place, name, columns[name], sampled, sketches.get(name))
        facts |= rows.agg(*asked).toArrow().to_pylist()[0]
    top = _most_frequent(rows.where(sampled), [name for name in names if columns[name] in ("string", "boolean")])
    cards = [
        ColumnCard(
            name=name,
            type=columns[name],
            sketch=base64.b64encode(facts[f"sketch {place}"]).decode(),
            top=tuple((value, count << zeros) for value, count in top.get(name, [])),
            quantiles=tuple(float(f"{q:.10g}") for q in facts.get(f"quantiles {place}") or ()),
            present=facts[f"present {place}"],
            distinct=facts[f"distinct {place}"],
            **{fact: facts.get(f"{fact} {place}") for fact in ("min", "max", "mean", "std")},
        )
        for place, name in enumerate(names)
    ]
    return Card(rows=facts["rows"], columns=tuple(cards), sampled=1 << zeros)


def _facts(place: int, name: str, dtype: str, sampled: Column, sketch: str | None) -> list[Column]:
    value, number = F.col(name), _number(name, dtype)
    distinct = F.hll_sketch_agg(F.when(value.isNotNull(), F.xxhash64(value)), F.lit(_HLL_LOG2))
    if sketch:
        distinct = F.hll_union(distinct, F.unbase64(F.lit(sketch)))
    found = {"present": F.count(value), "sketch": distinct, "distinct": F.hll_sketch_estimate(distinct)}
    if number is not None:
        percentiles = F.percentile_approx(F.when(sampled, number), _GRID.tolist(), 1000)
        found |= {"min": F.min(number), "max": F.max(number), "mean": F.avg(number), "std": F.stddev_pop(number)}
        found["quantiles"] = percentiles
    return [fact.alias(f"{key} {place}") for key, fact in found.items()]


def _number(name: str, dtype: str) -> Column | None:
    """What of a value is summarized as a number; None for text."""
    value = F.col(name)
    if dtype in ("string", "boolean"):
        return None
    if dtype == "date":
        return F.unix_date(value).cast("double") * 86400
    if dtype == "timestamp":
        return F.unix_micros(value) / 1e6
    if dtype == "binary":
        return F.octet_length(value).cast("double")
    if dtype.startswith("array"):
        return F.when(value.isNotNull(), F.size(value)).cast("double")
    if dtype.startswith("sparse"):
        return F.when(value.isNotNull(), F.size(value["ids"])).cast("double")
    return value.cast("double")


def _most_frequent(rows: DataFrame, names: list[str]) -> dict[str, list[tuple[str, int]]]:
    """The `TOP` values of each column and their rows, in one aggregation over all of them."""
    if not names:
        return {}
    text = [
        F.struct(F.lit(name).alias("name"), F.substring(F.col(name).cast("string"), 1, _TEXT_CHARS).alias("value"))
        for name in names
    ]
    values = rows.select(F.explode(F.array(*text)).alias("of")).select("of.*").dropna()
    best = Window.partitionBy("name").orderBy(F.desc("count"), "value")
    counted = values.groupBy("name", "value").count().withColumn("place", F.row_number().over(best))
    found: dict[str, list[tuple[str, int]]] = {}
    for row in counted.where(F.col("place") <= TOP).toArrow().sort_by("place").to_pylist():
        found.setdefault(row["name"], []).append((row["value"], row["count"]))
    return found


def _merge(a: ColumnCard, b: ColumnCard) -> ColumnCard:
    """The card of both columns' values."""
    counts: dict[str, int] = dict(a.top)
    for value, count in b.top:
        counts[value] = counts.get(value, 0) + count
    top = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:TOP]
    merged: dict[str, Any] = {"present": a.present + b.present, "top": tuple(top)}
    if not (a.present and b.present):
        numbers = a if a.present else b
        merged |= numbers.model_dump(include={"min", "max", "mean", "std", "quantiles"})
    elif a.mean is not None and b.mean is not None:
        share = b.present / merged["present"]
        apart = b.mean - a.mean
        variance = (1 - share) * _of(a.std) ** 2 + share * _of(b.std) ** 2 + share * (1 - share) * apart**2
        merged |= {"min": min(_of(a.min), _of(b.min)), "max": max(_of(a.max), _of(b.max))}
        merged |= {"mean": a.mean + share * apart, "std": math.sqrt(variance)}
        merged["quantiles"] = _mixture(np.array(a.quantiles), np.array(b.quantiles), share)
    return b.model_copy(update=merged)


def _of(value: float | None) -> float:
    assert value is not None
    return value


def _mixture(a: Floats, b: Floats, share: float) -> tuple[float, ...]:
    """Percentiles of values of which `share` are distributed as `b` and the others as `a`."""
    if not (len(a) and len(b)):
        return tuple((a if len(a) else b).tolist())
    a, b = (np.where(np.abs(x) < np.finfo(x.dtype).tiny, 0.0, x) for x in (a, b))  # slopes between denormals overflow
    points = np.unique(np.concatenate([a, b]))
    upto = (1 - share) * _share_upto(a, points) + share * _share_upto(b, points)
    below = (1 - share) * _share_below(a, points) + share * _share_below(b, points)
    steps = np.stack([below, upto], axis=1).ravel()  # a value that many rows have is a step
    return tuple(float(f"{q:.10g}") for q in np.interp(_GRID, steps, np.repeat(points, 2)))


def _share_upto(quantiles: Floats, points: Floats) -> Floats:
    """The share of values at or below each point."""
    shares: Floats = np.interp(points, quantiles, _GRID, left=0.0)
    return shares


def _share_below(quantiles: Floats, points: Floats) -> Floats:
    """The share of values below each point."""
    return 1 - _share_upto(-quantiles[::-1], -points)


def histogram(column: ColumnCard) -> tuple[list[float], list[float]]:
    """Edges of bins of one width, and the share of the present values in each, as the percentiles have it.

    The bins reach from percentile 1 to 99; the first and the last hold what lies beyond as well.
    """
    quantiles = np.array(column.quantiles)
    if not len(quantiles):
        return [], []
    low, high = (quantiles[1], quantiles[99]) if quantiles[99] > quantiles[1] else (quantiles[0], quantiles[-1])
    edges = np.linspace(low, high, _BINS + 1)
    return edges.tolist(), _shares_in(quantiles, edges[1:-1]).tolist()


def _shares_in(quantiles: Floats, cuts: Floats) -> Floats:
    """The share of values up to the first cut, between each two, and above the last."""
    shares: Floats = np.diff(_share_upto(quantiles, cuts), prepend=0.0, append=1.0)
    return shares


def _drift(then: ColumnCard, rows_then: int, now: ColumnCard, rows_now: int) -> Drift:
    missing = (rows_now - now.present) / rows_now - (rows_then - then.present) / max(rows_then, 1)
    psi = js = None
    if then.present and now.present:
        if then.quantiles and now.quantiles:
            tenths = np.array(then.quantiles)[10:91:10]
            cuts = np.unique([tenths, np.nextafter(tenths, -np.inf)])  # a value of many rows is a bin of its own
            psi = _psi(_shares_in(np.array(then.quantiles), cuts), _shares_in(np.array(now.quantiles), cuts))
        elif then.top and now.top:
            before, after = _text_shares(then, now)
            psi, js = _psi(before, after), float(jensenshannon(before, after, base=2) ** 2)
    return Drift(name=now.name, missing=missing, psi=psi, js=js)


def _text_shares(then: ColumnCard, now: ColumnCard) -> tuple[Floats, Floats]:
    """Of the values that either keeps, the shares in both; the last is that of all others."""
    values = list(dict.fromkeys(value for value, _ in (*then.top, *now.top)))
    found = []
    for column in (then, now):
        counts = dict(column.top)
        shares = np.array([counts.get(value, 0) / column.present for value in values])
        found.append(np.append(shares, max(0.0, 1 - shares.sum())))
    return found[0] / found[0].sum(), found[1] / found[1].sum()


def _psi(before: Floats, after: Floats) -> float:
    """The population stability index of two distributions over the same bins (Siddiqi, Credit Risk Scorecards, 2006)."""
    p, q = np.maximum(before, _LEAST_SHARE), np.maximum(after, _LEAST_SHARE)
    return float(np.sum((q - p) * np.log(q / p)))
