"""Push-sum: peers that send each other parts of what they hold come to the average of all, without a centre.

A peer holds values z and a weight w. It keeps half of its weight and sends z with the other half; what arrives is taken
in as a mean by weights. The sums of w and of w z over all peers stay what they are, so all z tend to the average:
D. Kempe et al., Gossip-based computation of aggregate information, FOCS 2003. To whom changes with each round, at
distances 1, 2, 4, ...: of n = 2^k peers in step each then has the exact average after k rounds. Such graphs: B. Ying et
al., Exponential graph is provably efficient for decentralized deep learning, NeurIPS 2021.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.errors import TrainingError

SHUN_FACTOR = 10  # a peer that is not there is left out for so many times as long as it took to see that
SHUN_LEAST_S = 1.0
LEAST_TO_SEND = 0.5


class Parcel(NamedTuple):
    """Values by name, and their weight."""

    tensors: Mapping[str, Tensor]
    weight: float


Deliver = Callable[[int, Parcel], bool]


def neighbour(members: Sequence[int], own: int, round_number: int) -> int:
    """To whom a member sends in a round: of n members that which is 2^(round mod ceil(log2 n)) behind it.

    Args:
        members: Two or more, in an order that all know.
        own: The one that sends.
        round_number: Its own count; members need not be in step.
    """
    distance: int = 1 << round_number % (len(members) - 1).bit_length()
    return members[(members.index(own) + distance) % len(members)]


class PushSum:
    """What one peer holds. One thread calls `take` and `send`, any may call `put` and `snapshot`.

    Sends are done in the background, one at a time: while one is under way there is no other. A parcel that could not
    be delivered comes back. Where the answer alone was lost, it then counts twice, with its weight, so that the average
    stays one of what peers hold; likewise where a peer is lost with what it holds.

    Args:
        own: This peer's rank.
        peers: All ranks that may be there, with this one.
        tensors: What is averaged, changed in place.
        deliver: Hands a parcel to a rank: whether it took it. A TrainingError where it is not there.

    Attributes:
        weight: Of what it holds.
        is_paused: Whether it sends nothing.
    """

    def __init__(self, own: int, peers: Iterable[int], tensors: Mapping[str, Tensor], deliver: Deliver) -> None:
        self.weight, self.is_paused, self._counts = 1.0, False, Counter[str]()
        self._own, self._tensors, self._deliver = own, tensors, deliver
        self._shunned_until = dict.fromkeys(sorted(peers), 0.0)
        self._round, self._lock = 0, threading.Lock()
        self._mail: list[tuple[int, Parcel]] = []
        self._thread = ThreadPoolExecutor(1)
        self._sending: Future[None] | None = None

    def put(self, sender: int, parcel: Parcel) -> bool:
        """Have a parcel taken in next. False where the sender's last one is not yet: a slow peer gathers no weight."""
        with self._lock:
            if any(found == sender for found, _ in self._mail):
                return False
            self._mail.append((sender, parcel))
            return True

    @torch.no_grad()
    def take(self) -> None:
        """Take in what arrived."""
        with self._lock:
            mail, self._mail = self._mail, []
        self.weight = _mixed(self._tensors, self.weight, mail)

    def send(self) -> None:
        """Keep half, and send half to the round's neighbour, if there is one and the last send is done.

        Not of less than half a peer's weight, so that none has less than a quarter.
        """
        now = time.monotonic()
        members = [rank for rank, until in self._shunned_until.items() if until <= now]
        if self._sending is not None and self._sending.done():
            self._sending = self._sending.result()
        if self._sending is not None or self.weight < LEAST_TO_SEND:
            return self._count("skipped")
        if len(members) > 1 and not self.is_paused:
            to = neighbour(members, self._own, self._round)
            self._round, self.weight = self._round + 1, self.weight / 2
            parcel = Parcel({name: copied(tensor) for name, tensor in self._tensors.items()}, self.weight)
            self._sending = self._thread.submit(self._hand_over, to, parcel)

    def counted(self) -> dict[str, int]:
        """Sends since this was last called: `sent`, `refused`, `failed`, and `skipped` as one was under way or the weight low."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return dict(counts)

    def settle(self, timeout_s: float) -> bool:
        """Wait until no parcel of this peer's is on its way; whether that came about."""
        return (sending := self._sending) is None or sending in wait([sending], timeout_s).done

    @torch.no_grad()
    def snapshot(self) -> Parcel:
        """A copy of all that this peer has, with what arrived. Not while `take` is under way."""
        with self._lock:
            tensors = {name: copied(tensor) for name, tensor in self._tensors.items()}
            return Parcel(tensors, _mixed(tensors, self.weight, self._mail))

    def _hand_over(self, to: int, parcel: Parcel) -> None:
        began = time.monotonic()
        try:
            fate = "sent" if self._deliver(to, parcel) else "refused"
        except TrainingError:
            fate, now = "failed", time.monotonic()
            self._shunned_until[to] = now + max(SHUN_LEAST_S, SHUN_FACTOR * (now - began))
        self._count(fate)
        if fate != "sent":
            with self._lock:
                self._mail.append((self._own, parcel))

    def _count(self, fate: str) -> None:
        with self._lock:
            self._counts[fate] += 1


def _mixed(tensors: Mapping[str, Tensor], weight: float, mail: Sequence[tuple[int, Parcel]]) -> float:
    """Take parcels in as a mean by weights; the weight of all."""
    for _, parcel in mail:
        weight += parcel.weight
        for name, tensor in tensors.items():
            tensor.lerp_(parcel.tensors[name].to(tensor.device), parcel.weight / weight)
    return weight


def copied(tensor: Tensor) -> Tensor:
    """As it can be sent: contiguous, in the CPU's memory, and its own."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
