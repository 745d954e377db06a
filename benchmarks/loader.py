"""Loaders side by side on three tables of 1 M rows, and what the lanes promise: make bench-loader

    python -m benchmarks.loader [PART ...]        # parts: readers, resume, memory, wait, growth, balance

Every loader reads in a process of its own, the same files where it can; medians of 5, each behind an epoch that warms up.
Headrace and pyarrow, whose ratios are near 1, take turns.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.apart import run
from benchmarks.loader_tables import ROWS, TABLES, path_of
from benchmarks.peers import REQUIREMENTS, python_of
from benchmarks.report import Figure, at_least, at_most, report

EPOCHS = 5


def rate(reader: str, table: Path, *, epochs: int = EPOCHS, python: str = sys.executable) -> float:
    """Rows per second, the median epoch."""
    found: list[float] = run("benchmarks.readers", reader, table, epochs, python=python)["rows_per_s"]
    return statistics.median(found)


def rates_in_turn(names: Sequence[str], table: Path) -> dict[str, float]:
    """Rows per second of each reader, the median over rounds: what else the machine does meets all of them."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(EPOCHS):
        for name in names:
            found[name].append(rate(name, table, epochs=2))
    return {name: statistics.median(rates) for name, rates in found.items()}


def readers() -> list[Figure]:
    """Rows per second of each loader on each table, and the ratios."""
    pythons = {peer: python_of(peer) for peer in REQUIREMENTS}
    found: list[Figure] = []
    for name in TABLES:
        table, begin = path_of(name), len(found)
        lists = path_of(name, as_lists=True) if name == "image" else table
        rates = rates_in_turn(["headrace", "headrace_in_order", "pyarrow"], table)
        rates |= {reader: rate(reader, lists) for reader in ("petastorm_batched", "petastorm_rows")}
        if python := pythons["mosaic"]:
            seconds = run("benchmarks.readers", "copy_for_mosaic", table, python=python)
            found.append(Figure(f"mosaic_copy_s_{name}", seconds, "s"))
            rates["mosaic"] = rate("mosaic", table, python=python)
        if python := pythons["huggingface"]:
            rates["huggingface"] = rate("huggingface", lists, python=python)
        found += [Figure(f"rows_per_s_{reader}_{name}", value, "rows/s") for reader, value in rates.items()]
        ours = rates["headrace"]
        found += [
            at_least(f"petastorm_{name}", ours / rates["petastorm_batched"], "x", 5),
            at_least(f"pyarrow_{name}", ours / rates["pyarrow"], "x", 0.8),
            at_least(f"shuffle_{name}", ours / rates["headrace_in_order"], "x", 0.9),
        ]
        if "mosaic" in rates:
            ratio = ours / rates["mosaic"]
            tabular = name != "image"
            found.append(at_least(f"mosaic_{name}", ratio, "x", 20) if tabular else Figure("mosaic_image", ratio, "x"))
        for line in found[begin:]:
            print(f"{line.id} {line.value:,.3f}", flush=True)
    return found


def resume() -> list[Figure]:
    """The first batch after a resume costs the same wherever it is."""
    seconds = run("benchmarks.lanes", "resume", path_of("ctr")).values()
    return [
        at_most("resume_spread", max(seconds) / min(seconds), "x", 1.2),
        at_most("resume_s", max(seconds), "s", 2.0),
    ]


def memory() -> list[Figure]:
    """Memory over 5 epochs, and against the plan's prediction."""
    seen = [run("benchmarks.lanes", "memory", path_of("ctr")) for _ in range(EPOCHS)]
    peaks = [statistics.median(epoch) for epoch in zip(*(one["peaks"] for one in seen), strict=True)]
    predicted = statistics.median(one["predicted"] for one in seen)
    ratio = predicted / max(peaks)
    return [
        Figure("memory_peak_mb", max(peaks), "MB"),
        Figure("memory_predicted_mb", predicted, "MB"),
        at_most("memory_growth", peaks[4] / peaks[1], "x", 1.03),
        Figure("memory_prediction", ratio, "x", goal="0.8 to 1.2", met=0.8 <= ratio <= 1.2),
    ]


def wait() -> list[Figure]:
    """Waiting for data on one rank."""
    return [
        at_most(f"wait_{name}", run("benchmarks.lanes", "wait", name)["share"], "share", bound)
        for name, bound in (("mnist", 0.05), ("mnist_softmax", 0.15))
    ]


def growth() -> list[Figure]:
    """1, 4 and 16 times the rows; from each table as many are read as the largest has."""
    factors = (1, 4, 16)
    tables = [path_of("f16", rows=factor * ROWS) for factor in factors]
    rounds = run("benchmarks.lanes", "growth", *tables)
    seconds = [statistics.median(table) for table in zip(*rounds, strict=True)]
    shares = [[value / sum(times) for value in times] for times in rounds]  # of its round, which may be a slow one
    share = [statistics.median(table) for table in zip(*shares, strict=True)]
    rows = factors[-1] * ROWS
    mb = [statistics.median(run("benchmarks.lanes", "peak", t, rows)["mb"] for _ in range(EPOCHS)) for t in tables]
    found = [Figure(f"growth_seconds_{n}m", value, "s") for n, value in zip(factors, seconds, strict=True)]
    found += [Figure(f"growth_mb_{n}m", value, "MB") for n, value in zip(factors, mb, strict=True)]
    return [
        *found,
        at_most("growth_time", max(share) / min(share), "x", 1.05),
        at_most("growth_memory", max(mb) / min(mb), "x", 1.05),
    ]


def balance() -> list[Figure]:
    """One rank of 4 slowed 5 times."""
    table = path_of("f16")
    off, auto = (run("benchmarks.lanes", "balance", table, how) for how in ("off", "auto"))
    return [
        Figure("balance_off_rows_per_s", off["rows_per_s"], "rows/s"),
        Figure("balance_auto_rows_per_s", auto["rows_per_s"], "rows/s"),
        at_least("balance_gain", auto["rows_per_s"] / off["rows_per_s"], "x", 2.5),
        at_least("balance_bound", auto["rows_per_s"] / auto["bound"], "share", 0.9),
    ]


PARTS: dict[str, Callable[[], list[Figure]]] = {
    "readers": readers,
    "resume": resume,
    "memory": memory,
    "wait": wait,
    "growth": growth,
    "balance": balance,
}


def main() -> int:
    """Returns the exit code: 1 where a goal was missed."""
    figures = [figure for part in sys.argv[1:] or PARTS for figure in PARTS[part]()]
    return report("loader", figures)


if __name__ == "__main__":
    sys.exit(main())
