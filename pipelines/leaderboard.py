"""The candidates of an evaluation as a table."""

from typing import Any

from pipelines.config.workload import LOWER_IS_BETTER, METRICS


def table(result: dict[str, Any]) -> str:
    """The result of `evaluate` as text, the best on validation marked.

    Args:
        result: `candidates`, `baselines` (models that need no training, where there are some), `champion`, `metric`,
            `against`.
    """
    candidates = result["candidates"]
    used = [metric for metric in METRICS if any(metric in candidate["metrics"] for candidate in candidates)]
    metric = result["metric"]
    on_validation = any(candidate["validation"] for candidate in candidates)
    interval = next((c["interval"] for c in candidates if c["interval"]), None)
    head = [
        "",
        "candidate",
        "kind",
        *([f"validation {metric}"] if on_validation else []),
        *used,
        *([f"{metric} {interval['confidence']:.0%}"] if interval else []),
        "fit s",
        "size kB",
        "rows/s",
    ]
    sign = 1 if metric in LOWER_IS_BETTER else -1
    ordered = sorted(candidates, key=lambda c: sign * (c["validation"] or c["metrics"]).get(metric, -sign * 1e300))
    lines = [head]
    for candidate in ordered:
        lines.append(
            [
                "*" if candidate["name"] == result["champion"] else "",
                candidate["name"],
                candidate["kind"],
                *([_number(candidate["validation"].get(metric))] if on_validation else []),
                *[_number(candidate["metrics"].get(name)) for name in used],
                *([_range(candidate["interval"])] if interval else []),
                f"{candidate['fit_seconds']:.1f}",
                f"{candidate['size_bytes'] / 1000:,.0f}",
                f"{candidate['rows_per_s']:,}",
            ]
        )
    for other in result.get("baselines", []):
        validation = [_number(other["validation"].get(metric))] if on_validation else []
        lines.append(["", other["name"], "baseline", *validation, *[_number(other["metrics"].get(n)) for n in used]])
    if against := result["against"]:
        row = ["", f"champion v{against['version']}", against["name"], *([""] if on_validation else [])]
        lines.append([*row, *[_number(against["metrics"].get(name)) for name in used]])
    lines = [[*line, *[""] * (len(head) - len(line))] for line in lines]
    widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _range(interval: dict[str, float] | None) -> str:
    return f"{_number(interval['low'])} to {_number(interval['high'])}" if interval else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.0f}"
