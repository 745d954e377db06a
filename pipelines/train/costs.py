"""What a step of each strategy takes: a cost model of computing, latency, bandwidth, overlap and stragglers.

`simulate.py` fits its constants to measured runs; docs/links.md says how near it comes to others. The formulas count what
a rank sends at a step. Exchanges among n ranks go round a ring: R. Thakur et al., Optimization of collective communication
operations in MPICH, 2005.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from pipelines.config import strategies as config

_NUMBER = 4  # bytes of a float32
_FIRST_BUCKET, _BUCKET = 1 << 20, 25 << 20  # bytes, of DistributedDataParallel


class Link(NamedTuple):
    """A rank's way to the others.

    Attributes:
        bytes_per_s: What it carries, in each direction.
        latency_s: What a message takes beside that.
        held: Share of a message's time that it waits longer where as many bytes come the other way.
        crowded: Share of what others send the same way, at moments of their own, that a message waits for.
    """

    bytes_per_s: float
    latency_s: float
    held: float = 0.0
    crowded: float = 0.0


class Size(BaseModel):
    """What of a network passes between ranks, in numbers of four bytes.

    Attributes:
        parameters: All.
        tensors: In how many tensors.
        thin: Rows and columns, summed over matrices: what PowerSGD of rank 1 makes of them.
        vectors: Parameters outside of matrices.
        boundary: From one layer to the next, a row.
        summed: What pairs of layers sum over ranks in both passes, a row, when each is cut in two.
        sums: Of these sums, how many.
    """

    model_config = ConfigDict(frozen=True)

    parameters: int
    tensors: int
    thin: int
    vectors: int
    boundary: int
    summed: int
    sums: int


class Compute(BaseModel):
    """What a rank takes without the others.

    Attributes:
        row_s: Seconds a row, forward and backward.
        part_s: Beside its rows, a pass of a part of the batch.
        step_s: Beside its parts, a step: reading, the optimizer, counting rows.
        packing_s: What hook or strategy does to each of `packed`, by `kind`.
        overlap: Share of the computing behind which an exchange of gradients is hidden.
        spread: Standard deviation of the logarithm of the seconds, from step to step and rank to rank.
    """

    model_config = ConfigDict(frozen=True)

    row_s: float
    part_s: float
    step_s: float
    packing_s: dict[str, float]
    overlap: float = 0.0
    spread: float = 0.0


class Exchange(NamedTuple):
    """What a rank exchanges at a step, averaged over steps.

    Attributes:
        sent_bytes: By a rank, the mean over ranks.
        path_bytes: One behind the other, where a step waits for them.
        messages: One behind the other.
        opposed_bytes: Of `path_bytes`, those that meet as many on their way back. A receiver of gloo's says when it is
            ready, in the stream that carries what it sends itself, so both directions are not used at once throughout.
        others_bytes: What others send to the same ranks, at moments of their own.
        least_bytes: Through the busiest link, even where nobody waits.
    """

    sent_bytes: float
    path_bytes: float
    messages: float
    opposed_bytes: float = 0.0
    others_bytes: float = 0.0
    least_bytes: float = 0.0

    def __add__(self, other: "Exchange") -> "Exchange":  # type: ignore[override]
        return Exchange(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, share: float) -> "Exchange":
        """Of each so much."""
        return Exchange(*(share * value for value in self))


_NOTHING = Exchange(0.0, 0.0, 0.0)


def ring_sum(num_bytes: float, ranks: int) -> Exchange:
    """An all-reduce: 2 (n - 1) / n of the bytes, in as many messages as there are ways to go."""
    sent = 2 * (ranks - 1) / ranks * num_bytes
    return Exchange(sent, sent, 2 * (ranks - 1))


def ring_gather(num_bytes: float, ranks: int) -> Exchange:
    """An all-gather of so many bytes of each rank: n - 1 times these."""
    sent = (ranks - 1) * num_bytes
    return Exchange(sent, sent, ranks - 1, opposed_bytes=sent)


def exchange(strategy: config.Strategy, size: Size, *, ranks: int, rows: int) -> Exchange:
    """What a rank exchanges at a step of a global batch of `rows` rows; behind the warm-up, where there is one."""
    whole = _NUMBER * size.parameters
    group = config.group_size(strategy, ranks)
    match strategy:
        case config.DataParallel():
            return _gradients(strategy.hook, size, ranks)
        case config.Sharded():
            # Gathered forward and backward; gloo sums gradients whole where NCCL would scatter them: 4, not 3 passes.
            return ring_gather(whole / ranks, ranks).times(2) + ring_sum(whole, ranks)
        case config.TensorParallel():
            group_rows = rows * group / ranks
            cut = ring_sum(_NUMBER * size.summed * group_rows, group)._replace(messages=2 * (group - 1) * size.sums)
            return cut + ring_sum(whole / group, ranks // group)
        case config.PipelineParallel():
            # What goes forward and what comes back pass each other, a part at a time, through all stages.
            part, turns = _NUMBER * size.boundary * _part_rows(rows * group / ranks, group), _turns(group)
            sent = 2 * part * _parts(group) * (group - 1) / group
            across = Exchange(sent, part * turns, turns, opposed_bytes=part * turns)
            return (across if group > 1 else _NOTHING) + ring_sum(whole / group, ranks // group)
        case config.LocalSGD() | config.DiLoCo():
            return ring_sum(whole, ranks).times(1 / strategy.every_steps)
        case config.ParameterServer():
            workers = ranks - strategy.servers
            # Between all coming behind each other and what they wait for where they come at random, with exponential
            # sizes: n + 1 for n workers of a server (M. Reiser and S. Lavenberg, Mean-value analysis, JACM 1980).
            busiest = workers / strategy.servers * whole
            sent, messages = 2 * whole * workers / ranks, 2 * strategy.servers
            return Exchange(sent, 2 * whole, messages, others_bytes=max(0.0, busiest - whole), least_bytes=busiest)
        case config.Gossip():
            # At most, to one peer each; rank 0 has no network, and nobody waits.
            return Exchange(whole / strategy.every_steps * (ranks - 1) / ranks, 0.0, 0.0)
        case config.BackupWorkers():
            # All pull through the server's link, and push; what comes too late meets the next pulls.
            path = (2 * (ranks - 1) - strategy.backups) * whole
            return Exchange(2 * whole * (ranks - 1) / ranks, path, 2)
        case config.Auto():
            raise ValueError("strategy: wanted what auto stands for, seen auto")


def _parts(group: int) -> int:
    """Into which a pipeline cuts a batch."""
    return config.PARTS_A_STAGE * group


def _part_rows(rows: float, group: int) -> int:
    """Of each part, as many: what is behind the last row is filled up."""
    return math.ceil(rows / _parts(group))


def _turns(group: int) -> int:
    """Of a pipeline, in each of which a stage has a part or waits for one."""
    return _parts(group) + group - 1


def _gradients(hook: config.Hook, size: Size, ranks: int) -> Exchange:
    num_bytes = _NUMBER * size.parameters
    buckets = 1 + math.ceil(max(0, num_bytes - _FIRST_BUCKET) / _BUCKET)
    match hook:
        case config.NoHook():
            found = ring_sum(num_bytes, ranks)
        case config.Half():
            found = ring_sum(num_bytes / 2, ranks)
        case config.PowerSGD():
            found = ring_sum(_NUMBER * (hook.rank * size.thin + size.vectors), ranks)
            buckets *= 3  # vectors, and the two thin matrices
        case config.TopK():
            found = ring_gather(2 * _NUMBER * hook.share * size.parameters, ranks)  # numbers and places
        case config.QSGD():
            found = ring_gather(size.parameters * (hook.bits / 8 + _NUMBER / config.QSGD_CHUNK), ranks)
    return found._replace(messages=found.messages * buckets)


def predicted_step_s(
    strategy: config.Strategy, size: Size, *, ranks: int, rows: int, link: Link, compute: Compute
) -> float:
    """Seconds of a step of a global batch of `rows` rows, averaged over many.

    Args:
        strategy: With its parameters.
        size: Of the network.
        ranks: At least 1.
        rows: Over all ranks.
        link: Of each rank; all reach each other through a switch that is never the narrowest place.
        compute: Of a rank.
    """
    computing = _computing(strategy, ranks, rows, compute)
    if ranks == 1:
        return computing
    moved = exchange(strategy, size, ranks=ranks, rows=rows)
    every = strategy.every_steps if isinstance(strategy, config.Local) else 1
    packing = compute.packing_s.get(kind(strategy), 0.0) * packed(strategy, size)
    busy = computing * _wait_for_slowest(strategy, ranks, compute.spread / math.sqrt(every)) + packing
    path_bytes = moved.path_bytes + link.held * moved.opposed_bytes + link.crowded * moved.others_bytes
    takes = path_bytes / link.bytes_per_s + moved.messages * link.latency_s
    hidden = compute.overlap * computing if isinstance(strategy, config.DataParallel) else 0.0
    return max(busy + max(0.0, takes - hidden), moved.least_bytes / link.bytes_per_s)


def kind(strategy: config.Strategy) -> str:
    """The hook's name, or the strategy's where it has none; what halves the bits is of one kind."""
    if not isinstance(strategy, config.DataParallel):
        return strategy.name
    return "half" if isinstance(strategy.hook, config.Half) else strategy.hook.name


def packed(strategy: config.Strategy, size: Size) -> int:
    """What a strategy's own work grows with: DTensor's with tensors, of which each operation is worked out anew."""
    return size.tensors if isinstance(strategy, config.TensorParallel) else size.parameters


def _computing(strategy: config.Strategy, ranks: int, rows: int, compute: Compute) -> float:
    group, groups = config.group_size(strategy, ranks), max(1, config.num_groups(strategy, ranks))
    if isinstance(strategy, config.PipelineParallel) and group > 1:
        part_s = _part_rows(rows / groups, group) * compute.row_s / group + compute.part_s
        return compute.step_s + _turns(group) * part_s
    return compute.step_s + compute.part_s + rows / groups * compute.row_s / group


def _wait_for_slowest(strategy: config.Strategy, ranks: int, spread: float) -> float:
    """How much longer the slowest rank takes that a step waits for than the mean of them; log-normal (G. Blom, 1958)."""
    if isinstance(strategy, config.ParameterServer | config.Gossip):
        return 1.0
    backups = strategy.backups + 1 if isinstance(strategy, config.BackupWorkers) else 0  # and the server
    quantile = (ranks - backups - 0.375) / (ranks - (backups > 0) + 0.25)
    return math.exp(spread * NormalDist().inv_cdf(quantile))


class Run(BaseModel):
    """A measured run.

    Attributes:
        name: Which.
        network: Whose `Size` it is.
        rows: Of the global batch.
        bytes_per_s: Of the link, each way.
        ranks_per_core: Above 1 where ranks share cores: then computing takes so much longer.
        step_s: The mean.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    network: str
    strategy: config.Strategy
    ranks: int
    rows: int
    bytes_per_s: float
    ranks_per_core: float = 1.0
    step_s: float


class Fitted(BaseModel):
    """The constants that come nearest to measured runs.

    Attributes:
        compute: By network.
        goodput: Share of a link's rate that is left to bytes of tensors.
        latency_s: Of a message.
        held: See `Link`.
        crowded: See `Link`.
        error: The largest relative error of the runs that it was not fitted to; None where there are none.
    """

    model_config = ConfigDict(frozen=True)

    sizes: dict[str, Size]
    compute: dict[str, Compute]
    goodput: float
    latency_s: float
    held: float = 0.0
    crowded: float = 0.0
    error: float | None = None

    def link(self, bytes_per_s: float) -> Link:
        """Of a rate."""
        return Link(bytes_per_s * self.goodput, self.latency_s, self.held, self.crowded)

    def step_s(self, run: Run) -> float:
        """What the model says of a run."""
        compute, slow = self.compute[run.network], max(1.0, run.ranks_per_core)
        compute = compute.model_copy(
            update={
                **{name: slow * getattr(compute, name) for name in ("row_s", "part_s", "step_s")},
                "packing_s": {name: slow * seconds for name, seconds in compute.packing_s.items()},
            }
        )
        return predicted_step_s(
            run.strategy,
            self.sizes[run.network],
            ranks=run.ranks,
            rows=run.rows,
            link=self.link(run.bytes_per_s),
            compute=compute,
        )

    def relative_error(self, run: Run) -> float:
        """Of a run's step."""
        return self.step_s(run) / run.step_s - 1
