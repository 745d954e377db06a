"""What share of a link's rate gloo's exchanges between two ranks reach, each way.

    python -m benchmarks.link_rates

Exit code 77 where network namespaces are not permitted.
"""

import sys
import time
from collections.abc import Callable

from benchmarks.links import Links, on_links
from benchmarks.report import Figure, report

SIZES = {"30kb": 30_000, "100kb": 100_000, "700kb": 700_000, "2700kb": 2_700_000}  # bytes that each rank sends
TIMES = 5


def measure(links: Links) -> int:
    """Returns the exit code."""
    from benchmarks.comm_cases import RATES
    from benchmarks.ranks import run_ranks

    figures = []
    for rate, mbit_per_s in RATES.items():
        links.set_rate(mbit_per_s)
        found: dict[str, float] = run_ranks(links, 2, seconds_of_exchanges)[0]
        for name, seconds in found.items():
            share = 8e-6 * SIZES[name.split(".")[1]] / seconds / mbit_per_s
            figures.append(Figure(f"{name}.{rate}", share, "share of the rate"))
    return report("link_rates", figures)


def seconds_of_exchanges(links: Links) -> dict[str, float]:
    """On a rank: the mean of some turns, by exchange and size."""
    import torch
    import torch.distributed as dist

    found, other = {}, 1 - dist.get_rank()
    for size, num_bytes in SIZES.items():
        ours = torch.zeros(num_bytes // 4)
        theirs = [torch.empty_like(ours) for _ in range(2)]

        def pass_each_other(ours: torch.Tensor = ours, theirs: list[torch.Tensor] = theirs) -> None:
            for work in (dist.isend(ours, other), dist.irecv(theirs[0], other)):
                assert work is not None, "both ranks are in the group"
                work.wait()

        exchanges: dict[str, Callable[[], object]] = {
            "all_reduce": lambda ours=ours: dist.all_reduce(ours),  # type: ignore[misc]
            "all_gather": lambda ours=ours, theirs=theirs: dist.all_gather(theirs, ours),  # type: ignore[misc]
            "isend_irecv": pass_each_other,
        }
        for name, exchange in exchanges.items():
            exchange()
            dist.barrier()
            began = time.perf_counter()
            for _ in range(TIMES):
                exchange()
            found[f"{name}.{size}"] = (time.perf_counter() - began) / TIMES
    return found


if __name__ == "__main__":
    sys.exit(on_links("link_rates", 2, measure))
