"""Why an epoch was slow: one line from where the ranks' time went."""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from pipelines.stream.times import PARTS
from pipelines.train.traffic import Traffic

WAITING_SHARE = 0.15  # of the slowest rank's time: from here on waiting for data is what to mend
EXCHANGE_SHARE = 0.3
UNEVEN_RATIO = 1.3


class RankTimes(BaseModel):
    """Where a rank's time went in an epoch, in seconds.

    Attributes:
        phases: Of the main thread, by phase; they add up to the epoch.
        loader: Of the loader's threads, by part; they work beside the main thread.
        sent_bytes: Over the rank's TCP connections.
        received_bytes: Likewise.
        staleness: Updates of the weights that a worker's gradients were behind, the mean; None of others.
    """

    model_config = ConfigDict(frozen=True)

    phases: dict[str, float]
    loader: dict[str, float]
    sent_bytes: int = 0
    received_bytes: int = 0
    staleness: float | None = None

    @classmethod
    def of(cls, phases: Mapping[str, float], loader: Mapping[str, float], exchanged: Traffic) -> "RankTimes":
        """From the clock of a rank, that of its loader, and its traffic."""
        sent, received = exchanged
        return cls(phases=dict(phases), loader=dict(loader), sent_bytes=sent, received_bytes=received)

    def numbers(self) -> list[float]:
        """All of it as numbers."""
        return [*self.phases.values(), *self.loader.values(), self.sent_bytes, self.received_bytes]

    def with_numbers(self, numbers: Sequence[float]) -> "RankTimes":
        """The times of another rank, whose `numbers` these are."""
        *times, sent, received = numbers
        return RankTimes(
            phases=dict(zip(self.phases, times, strict=False)),
            loader=dict(zip(self.loader, times[len(self.phases) :], strict=True)),
            sent_bytes=int(sent),
            received_bytes=int(received),
        )

    def share(self, phase: str) -> float:
        """Part of the epoch."""
        return self.phases[phase] / max(sum(self.phases.values()), 1e-9)

    @property
    def busy(self) -> float:
        """Seconds in which the rank did not wait for others."""
        return busy_seconds(self.phases)


def busy_seconds(phases: Mapping[str, float]) -> float:
    """The seconds of a rank's phases in which it did not wait for others."""
    return sum(phases.values()) - phases["communication"]


_ADVICE = {
    "read": "reading and decompressing the files; put the table on a faster disk, or raise train.prefetch_mb",
    "decode": "decoding {columns}; raise train.read_threads to {threads} where cores are free, or train on fewer columns",
    "shuffle": "putting rows in order; lower train.window to {window}",
    "collate": "making tensors; raise train.batch_size",
}


def why_slow(ranks: Sequence[RankTimes], *, columns: str, read_threads: int, window: int, may_balance: bool) -> str:
    """The verdict: the rank that the others wait for, what it does in that time, and what helps.

    Args:
        ranks: Times of all ranks.
        columns: The columns that are decoded.
        read_threads: The threads that read, a rank.
        window: The run's window.
        may_balance: Whether lanes could move away from a slow rank, and do not.
    """
    slowest = max(range(len(ranks)), key=lambda rank: ranks[rank].busy)
    times = ranks[slowest]
    if times.share("data") >= WAITING_SHARE:
        part = max(PARTS, key=lambda name: times.loader[name])
        advice = _ADVICE[part].format(columns=columns, threads=2 * read_threads, window=max(1, window // 2))
        return f"rank {slowest} waits {times.share('data'):.0%} for data: {advice}"
    others = sorted(rank.busy for number, rank in enumerate(ranks) if number != slowest)
    phase = max((p for p in times.phases if p not in ("data", "communication")), key=lambda p: times.phases[p])
    if others and times.busy > UNEVEN_RATIO * others[len(others) // 2]:
        ratio = times.busy / max(others[len(others) // 2], 1e-9)
        return (
            f"rank {slowest} takes {ratio:.1f} times as long as the others, most of it in {phase}; look at its machine"
            f"{', or set train.balance: auto' if may_balance else ''}"
        )
    if times.share("communication") >= EXCHANGE_SHARE:
        return (
            f"all ranks spend {times.share('communication'):.0%} or more exchanging gradients; raise train.batch_size, "
            "choose a train.strategy that sends less (docs/strategies.md), or use fewer ranks"
        )
    return f"no rank waits much: {times.share(phase):.0%} of the time is {_NAMES[phase]}"


_NAMES: Mapping[str, str] = {
    "copy": "copying batches to the device",
    "forward": "the forward pass",
    "backward": "the backward pass",
    "optimizer": "the optimizer",
    "other": "tallies, checkpoints and progress",
}
