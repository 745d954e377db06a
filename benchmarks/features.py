"""The features stage on generated rows of conf/ctr.yaml, against its peers and as the rows grow: make bench-features

    python -m benchmarks.features [--rows 2000000] [PART ...]     # parts: speed, arrow, vocabulary, skew, growth

Rows are generated and ingested once, and kept. In one session the stage and its peers take turns; the stage's time
holds its Snapshots, its receipt and its MLflow run.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import feature_values
from benchmarks.apart import run
from benchmarks.report import Figure, at_least, at_most, report, use_lake

ROWS, ROUNDS = 2_000_000, 3
FACTORS = (1, 4, 16)
MIN_COUNT = 10


def config_of(rows: int, *, min_count: int = MIN_COUNT) -> Any:
    """The workload of so many rows."""
    from pipelines.config import load_config

    overrides = {
        "workload": f"ctr_{rows}",
        "source.prepare.rows": rows,
        "features.inputs.ids.steps": f"[{{vocabulary: {{min_count: {min_count}}}}}]",
    }
    return load_config("conf/ctr.yaml", [f"{key}={value}" for key, value in overrides.items()])


def ingested(rows: int) -> Path:
    """The table of so many rows."""
    from pipelines.lake import table_path
    from pipelines.run import run_stages

    run_stages(config_of(rows), ["ingest"])
    return table_path(f"ctr_{rows}", "raw")


def stage(config: Any) -> tuple[float, Any]:
    """Seconds of the features stage, run whether or not it is up to date, and its receipt."""
    from pipelines.lake import receipt_path
    from pipelines.run import run_stages

    receipt_path(config.workload, "features").unlink(missing_ok=True)
    started = time.perf_counter()
    receipt = run_stages(config, ["features"])["features"]
    return time.perf_counter() - started, receipt


def measure_speed(rows: int) -> dict[str, Any]:
    """Seconds of the stage and of its peers in turn, and what the stage read its input for."""
    from benchmarks.feature_peers import PEERS, SPLITS, differing
    from pipelines.lake import table_path
    from pipelines.session import get_session

    config, raw = config_of(rows), ingested(rows)
    spark, folder = get_session(config), raw.parent / "peers"
    seconds: dict[str, list[float]] = {name: [] for name in ("headrace", *PEERS)}
    for _ in range(ROUNDS + 1):  # the first warms up
        for name, peer in PEERS.items():
            started = time.perf_counter()
            peer(spark, config, raw, folder / name)
            seconds[name].append(time.perf_counter() - started)
        taken, receipt = stage(config)
        seconds["headrace"].append(taken)
    read = spark.read.format("delta")
    pairs = [(table_path(config.workload, f"features/{split}"), folder / "by_hand" / split) for split in SPLITS]
    different = sum(differing(read.load(str(ours)), read.load(str(theirs))) for ours, theirs in pairs)
    return {"seconds": seconds, "differing": different, "input_reads": receipt.result["input_reads"]}


def measure_growth(rows: int, base: int) -> dict[str, float]:
    """Seconds of the stage on `rows` rows, and the driver's memory behind it; it warms up on `base` rows.

    A value must be as frequent, so that the vocabularies are as large however many rows there are.
    """
    import resource

    from benchmarks.driver_memory import settled_heap
    from pipelines.session import get_session

    stage(config_of(base))
    config = config_of(rows, min_count=MIN_COUNT * rows // base)
    seconds, _ = stage(config)
    heap = settled_heap(get_session(config))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "heap_mb": heap / 1e6, "python_peak_mb": peak / 1e6}


def measure_ingest(rows: int) -> int:
    """Rows of the ingested table; so that no other measure pays for it."""
    ingested(rows)
    return rows


MEASURES: dict[str, Callable[..., Any]] = {
    "speed": measure_speed,
    "growth": measure_growth,
    "ingest": measure_ingest,
    **feature_values.MEASURES,
}


def measured(name: str, *arguments: int) -> Any:
    """What a measure found, in a process of its own."""
    return run("benchmarks.features", "--measure", name, *arguments)


def speed(rows: int) -> list[Figure]:
    """Against a job written by hand, and MLlib's own stages."""
    measured("ingest", rows)
    found = measured("speed", rows)
    seconds = {name: statistics.median(times[1:]) for name, times in found["seconds"].items()}
    different = found["differing"]
    return [
        *[Figure(f"seconds_{name}", value, "s") for name, value in seconds.items()],
        at_most("vs_handwritten", seconds["headrace"] / seconds["by_hand"], "x", 1.1),
        at_least("vs_mllib", seconds["by_mllib"] / seconds["headrace"], "x", 2.0),
        at_most("rows_that_differ", different, "rows", 0),
        at_most("passes", len(found["input_reads"]), "reads", 3),
    ]


def growth(rows: int) -> list[Figure]:
    """1, 4 and 16 times the rows, 4 times being `rows`: time against proportional, and the driver's memory."""
    sizes = {factor: rows * factor // FACTORS[1] for factor in FACTORS}
    for size in sizes.values():
        measured("ingest", size)
    seen: dict[int, list[dict[str, float]]] = {factor: [] for factor in FACTORS}
    for _ in range(ROUNDS):
        for factor, size in sizes.items():
            seen[factor].append(measured("growth", size, sizes[1]))
    found, ratios = [], {}
    for what, unit in (("seconds", "s"), ("heap_mb", "MB"), ("python_peak_mb", "MB")):
        values = {factor: statistics.median(one[what] for one in seen[factor]) for factor in FACTORS}
        found += [Figure(f"growth_{what}_{factor}x", value, unit) for factor, value in values.items()]
        ratios[what] = max(values[f] / values[1] / (f if what == "seconds" else 1) for f in FACTORS)
    return [
        *found,
        at_most("growth_time", ratios["seconds"], "x", 1.1),
        at_most("growth_memory", max(ratios["heap_mb"], ratios["python_peak_mb"]), "x", 1.1),
    ]


PARTS: dict[str, Callable[[int], list[Figure]]] = {"speed": speed, **feature_values.PARTS, "growth": growth}


def main(arguments: list[str]) -> int:
    """Returns the exit code: 1 where a goal was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.features")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all by default")
    parser.add_argument("--rows", type=int, default=ROWS)
    chosen = parser.parse_args(arguments)
    return report("features", [figure for part in chosen.parts or PARTS for figure in PARTS[part](chosen.rows)])


def print_measure(name: str, *arguments: str) -> None:
    """Print what a measure finds as JSON, in the last line."""
    import json

    from pipelines.session import stop_session

    found = MEASURES[name](*map(int, arguments))
    stop_session()
    print(json.dumps(found))


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[1])
    use_lake("features")
    if sys.argv[1:2] == ["--measure"]:
        print_measure(*sys.argv[2:])
    else:
        sys.exit(main(sys.argv[1:]))
