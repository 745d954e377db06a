"""A benchmark's table: printed, and left in `build/bench/<name>.json`."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "build" / "bench"


@dataclass(frozen=True)
class Figure:
    """One measured figure; without a goal it is context for the others."""

    id: str
    value: float
    unit: str
    goal: str = ""
    met: bool = True


def at_most(id: str, value: float, unit: str, bound: float) -> Figure:
    """A figure that meets its goal up to `bound`."""
    return Figure(id, value, unit, goal=f"<= {bound:g}", met=value <= bound)


def at_least(id: str, value: float, unit: str, bound: float) -> Figure:
    """A figure that meets its goal from `bound` on."""
    return Figure(id, value, unit, goal=f">= {bound:g}", met=value >= bound)


def report(name: str, figures: list[Figure]) -> int:
    """Print and write the figures. Returns the exit code: 1 where a goal was missed."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps([asdict(figure) for figure in figures], indent=1) + "\n")
    width = max(len(figure.id) for figure in figures)
    for figure in figures:
        verdict = f"{figure.goal:<10} {'met' if figure.met else 'MISSED'}" if figure.goal else ""
        print(f"{figure.id:<{width}}  {figure.value:>14,.3f}  {figure.unit:<8}  {verdict}".rstrip(), flush=True)
    return int(not all(figure.met for figure in figures))


def use_lake(name: str) -> Path:
    """Let this process work in a lake of its own under `build/bench`; it is kept for the next time."""
    lake = FOLDER / "lakes" / name
    lake.mkdir(parents=True, exist_ok=True)
    os.environ["HEADRACE_LAKE"] = str(lake)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    return lake
