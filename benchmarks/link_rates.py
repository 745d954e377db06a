"""What share of a link's rate gloo's exchanges between two ranks reach, each way.

    python -m benchmarks.link_rates

Exit code 77 where network namespaces are not permitted.
"""

import sys
import time
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.links import Links, on_links
from benchmarks.report import Figure, report

if TYPE_CHECKING:
    from torch import Tensor

SIZES = {"30kb": 30_000, "100kb": 100_000, "700kb": 700_000, "2700kb": 2_700_000}  # bytes that each rank sends
TIMES = 5


def measure(links: Links) -> int:
    """Returns the exit code."""
    from benchmarks.comm_cases import RATES
    from benchmarks.ranks import run_ranks

    figures = []
    for rate, mbit_per_s in RATES.items():
        links.set_rate(mbit_per_s)
        found: dict[tuple[str, str], float] = run_ranks(links, 2, seconds_of_exchanges)[0]
        for (name, size), seconds in found.items():
            share = 8e-6 * SIZES[size] / seconds / mbit_per_s
            figures.append(Figure(f"{name}.{size}.{rate}", share, "share of the rate"))
    return report("link_rates", figures)


def seconds_of_exchanges(links: Links) -> dict[tuple[str, str], float]:
    """On a rank: the mean of some turns, by exchange and size."""
    import torch
    import torch.distributed as dist

    found = {}
    for size, num_bytes in SIZES.items():
        ours = torch.zeros(num_bytes // 4)
        theirs = [torch.empty_like(ours) for _ in range(2)]
        exchanges = {
            "all_reduce": partial(dist.all_reduce, ours),
            "all_gather": partial(dist.all_gather, theirs, ours),
            "isend_irecv": partial(pass_each_other, ours, theirs[0]),
        }
        for name, exchange in exchanges.items():
            exchange()
            dist.barrier()
            began = time.perf_counter()
            for _ in range(TIMES):
                exchange()
            found[name, size] = (time.perf_counter() - began) / TIMES
    return found


def pass_each_other(ours: "Tensor", theirs: "Tensor") -> None:
    """Send to the other rank what it waits for, and receive what it sends."""
    import torch.distributed as dist

    other = 1 - dist.get_rank()
    for work in (dist.isend(ours, other), dist.irecv(theirs, other)):
        assert work is not None, "both ranks are in the group"
        work.wait()


if __name__ == "__main__":
    sys.exit(on_links("link_rates", 2, measure))
