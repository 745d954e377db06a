"""Peers that average with each other: the average itself, and the train stage with it."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import TrainingError
from pipelines.stage import Made
from pipelines.stream import Batch
from pipelines.train.elastic.gossip import GossipWorker
from pipelines.train.elastic.ledger import Lease
from pipelines.train.elastic.pushsum import Parcel, PushSum, neighbour

SETTINGS = {
    "ranks": 4,
    "batch_size": 12,
    "epochs": 12,
    "timeout_s": 60,
    "threads": 1,
    "lr": 0.05,
    "strategy": "gossip",
}
LIMIT_S = 10


class Peers:
    """Peers in one process, each with a vector."""

    def __init__(self, start: np.ndarray) -> None:
        """`start` has a row a peer."""
        self.gone: set[int] = set()
        self.of = {
            own: PushSum(own, range(len(start)), {"x": torch.tensor(row, dtype=torch.float64)}, self.deliverer(own))
            for own, row in enumerate(start)
        }

    def deliverer(self, own: int) -> Callable[[int, Parcel], bool]:
        def deliver(to: int, parcel: Parcel) -> bool:
            if to in self.gone:
                raise TrainingError(f"rank {to}: gone")
            return self.of[to].put(own, parcel)

        return deliver

    def send(self, own: int) -> None:
        self.of[own].send()
        self.of[own].settle(LIMIT_S)

    def round(self) -> None:
        """All that are there send, and then take in."""
        there = [own for own in self.of if own not in self.gone]
        for own in there:
            self.send(own)
        for own in there:
            self.of[own].take()

    def held(self) -> list[tuple[np.ndarray, float]]:
        found = [self.of[own].snapshot() for own in self.of if own not in self.gone]
        return [(parcel.tensors["x"].numpy(), parcel.weight) for parcel in found]

    def error(self, mean: np.ndarray) -> float:
        return float(np.linalg.norm([values - mean for values, _ in self.held()]))


def mixing_matrix(size: int) -> np.ndarray:
    """Of one period: what each peer (row) has of each (column) behind it."""
    product, members = np.eye(size), list(range(size))
    for number in range((size - 1).bit_length()):
        step = np.eye(size) / 2
        for own in members:
            step[neighbour(members, own, number), own] += 0.5
        product = step @ product
    return product


@pytest.mark.parametrize("size", range(2, 10))
def test_the_error_falls_as_the_spectral_gap_says(size: int) -> None:
    matrix, mean_of_all = mixing_matrix(size), np.full((size, size), 1 / size)
    assert np.allclose(matrix.sum(axis=0), 1) and np.allclose(matrix.sum(axis=1), 1)
    _, singular, rows = np.linalg.svd(matrix - mean_of_all)
    slowest = rows[0]  # the start of which least is gone behind a period
    for start in (np.stack([slowest, 3 * slowest], axis=1), np.random.default_rng(size).normal(size=(size, 4))):
        peers, mean = Peers(start), start.mean(axis=0)
        before = error = peers.error(mean)
        for _ in range(4):
            for _ in range((size - 1).bit_length()):
                peers.round()
            last, error = error, peers.error(mean)
            assert error <= singular[0] * last + 1e-12
            if start.shape[1] == 2:
                assert error == pytest.approx(singular[0] * last, rel=1e-6, abs=1e-12)
        assert error <= singular[0] ** 4 * before + 1e-12
        assert sum(weight for _, weight in peers.held()) == pytest.approx(size)
    print(f"{size} peers: {(size - 1).bit_length()} rounds leave {singular[0]:.3f} of the error")
    assert (singular[0] < 1e-12) == (size & (size - 1) == 0), "powers of two have the average behind one period"


@given(st.data(), st.integers(2, 6))
def test_nothing_is_lost_whoever_sends_when(data: st.DataObject, size: int) -> None:
    start = np.random.default_rng(size).normal(size=(size, 3))
    peers, own = Peers(start), st.integers(0, size - 1)
    for what, who in data.draw(
        st.lists(st.tuples(st.sampled_from(["send", "take", "gone", "back"]), own), max_size=40)
    ):
        if what in ("gone", "back"):
            peers.gone ^= {who} & (peers.gone if what == "back" else set(peers.of))
        elif who not in peers.gone:
            peers.send(who) if what == "send" else peers.of[who].take()
    peers.gone = set()
    assert sum(weight for _, weight in peers.held()) == pytest.approx(size)
    total = sum(values * weight for values, weight in peers.held())
    assert total == pytest.approx(start.sum(axis=0), abs=1e-12)


def test_those_that_stay_agree_when_one_is_lost() -> None:
    peers = Peers(np.random.default_rng(0).normal(size=(5, 3)))
    peers.round()
    peers.gone = {3}
    for _ in range(60):
        peers.round()
    values = np.stack([values for values, _ in peers.held()])
    assert np.abs(values - values[0]).max() < 1e-6
    assert peers.of[2].counted()["failed"] > 0


def test_a_peer_that_takes_nothing_gathers_no_weight() -> None:
    peers = Peers(np.zeros((2, 1)))
    for _ in range(50):
        peers.send(0)
        peers.of[0].take()
    assert peers.of[0].counted() == {"sent": 1, "refused": 49}
    assert [weight for _, weight in peers.held()] == [0.5, 1.5]


def test_every_row_is_accounted_for(forked_ranks: None, train: Callable[..., Made]) -> None:
    made = train(**SETTINGS | {"epochs": 4}, schedule="CosineAnnealingLR")
    epochs = made.result["epochs"]
    assert accounted(made) and not made.result["restarts"]
    exchange = epochs[-1]["exchange"]
    assert exchange["weight"] == pytest.approx(3), "of three peers"
    assert sum(epoch["exchange"]["sends_sent"] for epoch in epochs) > 0
    assert 0 < exchange["consensus_error"] < 0.5
    assert epochs[-1]["loss"] < epochs[0]["loss"]


def accounted(made: Made) -> bool:
    rows = {(epoch["rows"], epoch["row_id_sum"]) for epoch in made.result["epochs"]}
    return len(rows) == 1 and next(iter(rows))[0] == 120


@pytest.mark.parametrize("restarts", [0, 2], ids=["for good", "and comes back"])
def test_a_killed_peer_costs_only_itself(
    forked_ranks: None, train: Callable[..., Made], signalled: Callable[..., None], restarts: int
) -> None:
    signalled(2, signal.SIGKILL, epoch=1)
    made = train(max_restarts=restarts, **SETTINGS)
    (told,) = made.result["restarts"]
    assert told.startswith("rank 2 on ") and told.endswith("started again" if restarts else "given up")
    assert accounted(made)
    exchange = made.result["epochs"][-1]["exchange"]
    assert 1 < exchange["weight"] < (4 if restarts else 3), "what it held is gone, what others hold is not"
    assert exchange["consensus_error"] < 0.5


def test_where_the_only_peer_is_lost_the_book_goes_back(
    forked_ranks: None, train: Callable[..., Made], signalled: Callable[..., None]
) -> None:
    signalled(1, signal.SIGKILL, epoch=3, step=4)
    made = train(**SETTINGS | {"ranks": 2})
    assert sorted(line[:6] for line in made.result["restarts"]) == ["rank 0", "rank 1"]
    assert accounted(made) and len(made.result["epochs"]) == SETTINGS["epochs"]


def test_a_killed_chief_comes_back_and_peers_go_on(
    forked_ranks: None, train: Callable[..., Made], signalled: Callable[..., None]
) -> None:
    signalled(0, signal.SIGKILL, epoch=3)
    made = train(checkpoint={"every_steps": 4}, **SETTINGS)
    (told,) = made.result["restarts"]
    assert told.startswith("rank 0 on ") and told.endswith("ended by signal 9; started again")
    assert accounted(made) and len(made.result["epochs"]) == SETTINGS["epochs"]
    assert made.result["epochs"][-1]["exchange"]["weight"] == pytest.approx(3)


def test_a_stopped_peer_does_not_set_the_pace(
    forked_ranks: None, train: Callable[..., Made], signalled: Callable[..., None]
) -> None:
    """It is stopped for good, and the others end long before anybody would give it up."""
    signalled(2, signal.SIGSTOP, epoch=1)
    began = time.monotonic()
    made = train(**SETTINGS | {"timeout_s": 240})
    assert accounted(made) and time.monotonic() - began < 100, "half the limit without a sign of life"


def test_each_row_that_is_learned_again_is_told(
    forked_ranks: None, train: Callable[..., Made], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What a slow peer learns while others do its parts: to the end of the run."""
    entry = GossipWorker._entry

    def written(self: GossipWorker, batch: Batch, lease: Lease, learned: dict[str, Any]) -> dict[str, Any]:
        with (tmp_path / f"learned-{self.rank}").open("a") as file:
            file.write(f"{batch.rows}\n")
        time.sleep(0.05 if self.rank == 2 else 0.005)
        return entry(self, batch, lease, learned)

    monkeypatch.setattr(GossipWorker, "_entry", written)
    made = train(**SETTINGS | {"epochs": 6})
    assert accounted(made)
    learned = sum(int(rows) for path in tmp_path.glob("learned-*") for rows in path.read_text().split())
    told = [epoch["exchange"]["repeated_rows"] for epoch in made.result["epochs"]]
    assert sum(told) == learned - 6 * 120
