"""The tables of docs/links.md from build/bench/comm.json.

python -m benchmarks.comm_table
"""

import json
import sys

from benchmarks.report import FOLDER

RATES = ("1gbit", "100mbit", "20mbit")
LABELS = {  # of figures that are not named as their strategy or hook is
    "ddp": "data_parallel",
    "powersgd": "powersgd, rank 1",
    "powersgd_4": "powersgd, rank 4",
    "topk": "topk, 1 %",
    "qsgd": "qsgd, 8 bits",
    "qsgd_4bit": "qsgd, 4 bits",
    "tensor": "tensor_parallel",
    "pipeline": "pipeline_parallel",
    "local_sgd": "local_sgd, every 141 steps",
    "diloco": "diloco, every 141 steps",
    "parameter_server": "parameter_server, 3 ranks",
    "backup_workers": "backup_workers, 4 ranks",
    "gossip": "gossip, 3 ranks",
}


def main() -> int:
    """Returns the exit code."""
    figures = {figure["id"]: figure["value"] for figure in json.loads((FOLDER / "comm.json").read_text())}
    for prefix, judged_by, title in (("", "accuracy", "accuracy"), ("gpt.", "loss", "nats a character")):
        print_row("strategy", "rows/s at 1 Gbit/s", "100 Mbit/s", "20 Mbit/s", "kB a step", title)
        print("|---" * 6 + "|")
        for name, label in named(figures, prefix, f".1gbit.{judged_by}"):
            rows = [f"{figures[f'{prefix}{name}.{rate}.rows_per_s']:,.0f}" for rate in RATES]
            sent = figures[f"{prefix}{name}.100mbit.bytes_per_step"] / 1e3
            print_row(label, *rows, f"{sent:,.0f}", f"{figures[f'{prefix}{name}.1gbit.{judged_by}']:.4f}")
        print()
    print_row("strategy", "network", "rows/s at 100 Mbit/s", "kB a step")
    print("|---" * 4 + "|")
    for prefix, network in (("", "mlp"), ("gpt.", "gpt")):
        for name, label in named(figures, prefix, ".100mbit.4_ranks.rows_per_s"):
            case = f"{prefix}{name}.100mbit.4_ranks"
            sent = figures[f"{case}.bytes_per_step"] / 1e3
            print_row(label, network, f"{figures[f'{case}.rows_per_s']:,.0f}", f"{sent:,.0f}")
    return 0


def named(figures: dict[str, float], prefix: str, suffix: str) -> list[tuple[str, str]]:
    """The strategies whose figures begin and end so, each with its label."""
    between = [key[len(prefix) : -len(suffix)] for key in figures if key.startswith(prefix) and key.endswith(suffix)]
    return [(name, LABELS.get(name, name)) for name in between if "." not in name]


def print_row(*cells: str) -> None:
    """As Markdown has a row of a table."""
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(main())
