"""The tables of docs/links.md from build/bench/comm.json.

python -m benchmarks.comm_table
"""

import json
import sys

from benchmarks.report import FOLDER

RATES = ("1gbit", "100mbit", "20mbit")


def main() -> int:
    """Returns the exit code."""
    figures = {figure["id"]: figure["value"] for figure in json.loads((FOLDER / "comm.json").read_text())}
    names = [name.removesuffix(".1gbit.rows_per_s") for name in figures if name.endswith(".1gbit.rows_per_s")]
    print("| strategy | rows/s at 1 Gbit/s | 100 Mbit/s | 20 Mbit/s | kB a step | accuracy |")
    print("|---|---|---|---|---|---|")
    for name in names:
        rows = [f"{figures[f'{name}.{rate}.rows_per_s']:,.0f}" for rate in RATES]
        sent = figures[f"{name}.100mbit.bytes_per_step"] / 1e3
        learned = next(figures[key] for key in (f"{name}.1gbit.accuracy", f"{name}.1gbit.loss") if key in figures)
        print(f"| {name} | {' | '.join(rows)} | {sent:,.0f} | {learned:.4f} |")
    print("\n| strategy | ranks | rows/s at 100 Mbit/s | kB a step |\n|---|---|---|---|")
    for key in [key for key in figures if key.endswith("_ranks.rows_per_s")]:
        name, _, ranks = key.removesuffix("_ranks.rows_per_s").rpartition(".")
        sent = figures[key.replace("rows_per_s", "bytes_per_step")] / 1e3
        print(f"| {name.removesuffix('.100mbit')} | {ranks} | {figures[key]:,.0f} | {sent:,.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
