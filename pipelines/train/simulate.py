"""The cost model's constants, fitted to measured runs, and what it says of clusters past one machine.

    python -m pipelines.train.simulate --help

plots 2 to 1,024 ranks with the constants that `make bench-comm` fitted to its runs, or with those of the docs.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import least_squares

from pipelines.config import strategies as config
from pipelines.errors import ConfigError
from pipelines.train.costs import Compute, Fitted, Run, Size, kind, packed, predicted_step_s

MODEL_PATH = Path("build/bench/comm_model.json")
KEPT_PATH = Path("docs/comm_model.json")  # of the run that docs/links.md tells of
PLOT_PATH = Path("build/scaling.png")
ROWS = 64  # a node, where nothing else is said


def fit(runs: Sequence[Run], sizes: dict[str, Size], *, spread: float = 0.0) -> Fitted:
    """The least errors of the logarithm of seconds, squared while they are small, over positive constants."""
    networks = sorted({run.network for run in runs})
    together = [run for run in runs if run.ranks > 1 and not isinstance(run.strategy, config.Local)]
    packings = {kind(run.strategy): 1e-3 / packed(run.strategy, sizes[run.network]) for run in together}
    starts = [1e-4, 1e-3, 1e-2] * len(networks) + [*packings.values(), 0.3, 0.4, 0.3, 0.95, 2e-4]
    highest = [1.0, 1.0, 1.0] * len(networks) + [1.0] * len(packings) + [1.0, 1.0, 1.0, 1.1, 1.0]

    def of(logarithms: "np.ndarray[Any, np.dtype[np.float64]]") -> Fitted:
        numbers = np.exp(logarithms).tolist()
        packing = dict(zip(packings, numbers[3 * len(networks) : -5], strict=True))
        overlap, held, crowded, goodput, latency_s = numbers[-5:]
        compute = {
            network: Compute(
                row_s=row_s, part_s=part_s, step_s=step_s, packing_s=packing, overlap=overlap, spread=spread
            )
            for network, row_s, part_s, step_s in zip(
                networks, *(numbers[i : 3 * len(networks) : 3] for i in range(3)), strict=True
            )
        }
        return Fitted(sizes=sizes, compute=compute, goodput=goodput, latency_s=latency_s, held=held, crowded=crowded)

    def errors(logarithms: "np.ndarray[Any, np.dtype[np.float64]]") -> list[float]:
        fitted = of(logarithms)
        return [math.log(fitted.step_s(run) / run.step_s) for run in runs]

    bounds = (np.full(len(starts), math.log(1e-12)), np.log(highest))
    found = least_squares(errors, np.log(starts), bounds=bounds, loss="soft_l1", f_scale=0.1, xtol=1e-12, ftol=1e-12)
    return of(found.x)


PLOTTED: dict[str, config.Strategy] = {
    "data_parallel": config.DataParallel(),
    "data_parallel, fp16": config.DataParallel(hook=config.Half(name="fp16")),
    "data_parallel, powersgd": config.DataParallel(hook=config.PowerSGD()),
    "data_parallel, topk": config.DataParallel(hook=config.TopK()),
    "data_parallel, qsgd": config.DataParallel(hook=config.QSGD()),
    "sharded": config.Sharded(),
    "tensor_parallel, 2 a group": config.TensorParallel(size=2),
    "pipeline_parallel, 2 a group": config.PipelineParallel(size=2),
    "local_sgd, every 64": config.LocalSGD(),
    "parameter_server, 1 in 4": config.ParameterServer(),
    "backup_workers": config.BackupWorkers(),
    "gossip": config.Gossip(),
}
NODES = tuple(2**power for power in range(1, 11))


def speedups(fitted: Fitted, network: str, *, rows: int, bytes_per_s: float) -> dict[str, list[float]]:
    """Rows/s of each of `PLOTTED` at each number of `NODES` over those of one node, with `rows` rows a node."""
    compute, size, link = fitted.compute[network], fitted.sizes[network], fitted.link(bytes_per_s)
    alone = predicted_step_s(config.DataParallel(), size, ranks=1, rows=rows, link=link, compute=compute)

    def of(strategy: config.Strategy, nodes: int) -> float:
        if isinstance(strategy, config.ParameterServer):
            strategy = config.ParameterServer(servers=max(1, nodes // 4))
        rows_of_all = rows * config.num_groups(strategy, nodes) * config.group_size(strategy, nodes)
        step_s = predicted_step_s(strategy, size, ranks=nodes, rows=rows_of_all, link=link, compute=compute)
        return rows_of_all / step_s / (rows / alone)

    return {
        name: [of(strategy, n) if config.num_groups(strategy, n) > 0 else math.nan for n in NODES]
        for name, strategy in PLOTTED.items()
    }


def plot(fitted: Fitted, network: str, *, rows: int) -> Figure:
    """How rows/s grow with nodes on three links."""
    figure = Figure(figsize=(15, 5), layout="constrained")
    for axes, mbit_per_s in zip(figure.subplots(1, 3, sharey=True), (100, 1000, 10_000), strict=True):
        assert isinstance(axes, Axes)
        found = speedups(fitted, network, rows=rows, bytes_per_s=mbit_per_s * 1e6 / 8)
        for place, (name, values) in enumerate(found.items()):
            axes.plot(NODES, values, marker="o", markersize=3, label=name, linestyle=("-", "--")[place // 10])
        axes.plot(NODES, NODES, color="black", linewidth=0.5, label="as many times as nodes")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set(xlabel="nodes", title=f"{mbit_per_s:,} Mbit/s")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.supylabel("rows/s over those of one node")
    told = f"{network}, {rows} rows a node, {1e3 * fitted.latency_s:.3g} ms a message, constants of `make bench-comm`"
    figure.suptitle(f"Simulation, not a measurement: {told}")
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Print and plot. Returns the exit code.

    Raises:
        ConfigError: There are no constants, or none of that network.
    """
    parser = argparse.ArgumentParser(description=f"Rows/s on {NODES[0]} to {NODES[-1]:,} nodes, simulated.")
    parser.add_argument("--model", type=Path, help=f"constants (default: {MODEL_PATH}, else {KEPT_PATH})")
    parser.add_argument("--network", help="whose constants (default: the first)")
    parser.add_argument("--rows", type=int, default=ROWS, help="a node takes at a step (default: %(default)s)")
    parser.add_argument("--latency-ms", type=float, help="of a message (default: as fitted)")
    parser.add_argument("--plot", type=Path, default=PLOT_PATH, help="where to (default: %(default)s)")
    options = parser.parse_args(arguments)
    path = options.model or (MODEL_PATH if MODEL_PATH.is_file() else KEPT_PATH)
    if not path.is_file():
        raise ConfigError(f"{path}: wanted the cost model's constants, seen nothing; make bench-comm fits them")
    fitted = Fitted.model_validate_json(path.read_bytes())
    if options.latency_ms is not None:
        fitted = fitted.model_copy(update={"latency_s": options.latency_ms / 1e3})
    network = options.network or next(iter(fitted.sizes))
    if network not in fitted.sizes:
        raise ConfigError(f"--network: wanted one of {', '.join(fitted.sizes)}, seen {network}")
    print(
        f"simulation by {path}: rows/s over those of one node, {network}, {options.rows} rows a node, "
        f"{1e3 * fitted.latency_s:.3g} ms a message"
    )
    for mbit_per_s in (100, 1000, 10_000):
        print(f"\n{mbit_per_s:>6,} Mbit/s, nodes {' '.join(f'{nodes:>7,}' for nodes in NODES)}")
        for name, values in speedups(fitted, network, rows=options.rows, bytes_per_s=mbit_per_s * 1e6 / 8).items():
            print(f"{name:<28} {' '.join(f'{value:>7.1f}' for value in values)}")
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    plot(fitted, network, rows=options.rows).savefig(options.plot, dpi=110)
    print(f"\n{options.plot}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
