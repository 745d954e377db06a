"""A data card as one HTML page without scripts or other files: a row a column, with bars of what it holds."""

from datetime import datetime, timezone
from html import escape

from pipelines.card import Card, ColumnCard, Drift, histogram

_WIDTH, _HEIGHT, _TOP = 220, 48, 8
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #1f2933; margin: 2rem auto; max-width: 1180px; padding: 0 1rem }
h1 { font-size: 1.3rem; margin: 0 } p { color: #52606d; margin: .3rem 0 1.2rem }
table { border-collapse: collapse; width: 100% }
th { text-align: left; font-weight: 600; color: #52606d; border-bottom: 2px solid #cbd2d9; padding: .3rem .6rem }
td { border-bottom: 1px solid #e4e7eb; padding: .5rem .6rem; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
small { color: #7b8794 } .moved { color: #b44d12; font-weight: 600 }
svg { display: block } svg text { font: 11px system-ui, sans-serif; fill: #3e4c59 } rect { fill: #4c7fb8 }
"""


def page(card: Card, *, title: str) -> str:
    """The card as HTML."""
    drift = {moved.name: moved for moved in card.drift}
    sampled = f"; percentiles and frequent values from one row in {card.sampled:,}" if card.sampled > 1 else ""
    against = " Drift is that of the rows that came last against the version before." if drift else ""
    head = "".join(f"<th>{name}</th>" for name in ("column", "missing", "distinct", "values", "distribution", "drift"))
    rows = "\n".join(_row(column, card.rows, drift.get(column.name)) for column in card.columns)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style>\n<h1>{escape(title)}</h1>\n"
        f"<p>{card.rows:,} rows, {len(card.columns)} columns{sampled}.{against}</p>\n"
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></html>\n"
    )


def _row(column: ColumnCard, rows: int, drift: Drift | None) -> str:
    missing = (rows - column.present) / rows if rows else 0.0
    picture = _histogram(column) if column.quantiles else _bars(column)
    cells = [
        f"<td><b>{escape(column.name)}</b><br><small>{escape(column.type)}</small></td>",
        f'<td class="number">{missing:.2%}</td>',
        f'<td class="number">{column.distinct:,}</td>',
        f"<td>{_numbers(column)}</td>",
        f"<td>{picture}</td>",
        f"<td>{_drift(drift)}</td>",
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _numbers(column: ColumnCard) -> str:
    if column.mean is None or not column.quantiles:
        return ""
    facts = {
        "min": column.min,
        "25 %": column.quantiles[25],
        "median": column.quantiles[50],
        "75 %": column.quantiles[75],
        "max": column.max,
        "mean": column.mean,
    }
    shown = [f"<small>{name}</small>&nbsp;{_value(value, column.type)}" for name, value in facts.items()]
    if column.type not in ("date", "timestamp"):
        shown.append(f"<small>std</small>&nbsp;{_value(column.std, column.type)}")
    return " &ensp;".join(shown)


def _value(value: float | None, dtype: str) -> str:
    if value is None:
        return ""
    if dtype in ("date", "timestamp"):
        moment = datetime.fromtimestamp(value, timezone.utc)
        return f"{moment:%Y-%m-%d}" if dtype == "date" else f"{moment:%Y-%m-%d&nbsp;%H:%M}"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:,.4g}"


def _histogram(column: ColumnCard) -> str:
    edges, shares = histogram(column)
    width, most = _WIDTH / len(shares), max(shares) or 1.0
    bars = [
        f'<rect x="{place * width:.1f}" y="{_HEIGHT * (1 - share / most):.1f}" width="{width - 1:.1f}" '
        f'height="{_HEIGHT * share / most:.1f}"><title>{_value(edges[place], column.type)} to '
        f"{_value(edges[place + 1], column.type)}: {share:.1%}</title></rect>"
        for place, share in enumerate(shares)
    ]
    first, last = _value(edges[0], column.type), _value(edges[-1], column.type)
    labels = f'<text x="0" y="{_HEIGHT + 13}">{first}</text>'
    labels += f'<text x="{_WIDTH}" y="{_HEIGHT + 13}" text-anchor="end">{last}</text>'
    return _svg(_HEIGHT + 18, "".join(bars) + labels)


def _bars(column: ColumnCard) -> str:
    """The most frequent texts, a bar each."""
    lines = []
    for place, (value, count) in enumerate(column.top[:_TOP]):
        share = count / column.present
        text = value if len(value) <= 24 else f"{value[:23]}…"
        lines.append(
            f'<rect x="0" y="{16 * place + 3}" width="{max(1.0, 60 * share / (column.top[0][1] / column.present)):.1f}" '
            f'height="9"><title>{escape(value)}: {count:,}</title></rect>'
            f'<text x="66" y="{16 * place + 12}">{escape(text)} {share:.1%}</text>'
        )
    return _svg(16 * len(lines), "".join(lines)) if lines else ""


def _svg(height: int, content: str) -> str:
    return f'<svg width="{_WIDTH}" height="{height}" role="img">{content}</svg>'


def _drift(drift: Drift | None) -> str:
    if drift is None:
        return ""
    shown = [] if drift.psi is None else [f'<span class="{_moved(drift.psi > 0.2)}">PSI {drift.psi:.3f}</span>']
    shown += [] if drift.js is None else [f"<small>JS {drift.js:.3f}</small>"]
    shown.append(f'<small class="{_moved(abs(drift.missing) > 0.05)}">missing {drift.missing:+.2%}</small>')
    return "<br>".join(shown)


def _moved(far: bool) -> str:
    return "moved" if far else "still"
