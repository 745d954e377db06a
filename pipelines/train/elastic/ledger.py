"""The book of an epoch's rows: which parts are done, and who is at which.

A part is a global batch's rows of one group of lanes. Parts of a group are done one behind the other; a worker holds a
range of them. Who has nothing left takes the upper half of the longest range that is left, so that work moves away from
ranks that are slow, stopped or gone, and nobody needs to know which; of a range of one part both do it, and the first
counts (R. Blumofe and C. Leiserson, Scheduling multithreaded computations by work stealing, JACM 1999; the backup tasks
of J. Dean and S. Ghemawat, MapReduce, OSDI 2004).
"""

from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict


class Lease(BaseModel):
    """Parts [first, end) of a group, of an epoch.

    Attributes:
        number: Names the range.
    """

    model_config = ConfigDict(frozen=True)

    number: int
    epoch: int
    group: int
    first: int
    end: int


@dataclass
class _Range:
    group: int
    next: int  # the part that is to be noted next
    end: int
    holders: set[int] = field(default_factory=set)

    @property
    def left(self) -> int:
        return self.end - self.next


class Ledger:
    """Parts of one epoch.

    Args:
        epoch: Its number.
        groups: Groups of lanes.
        steps: Global batches.
    """

    def __init__(self, epoch: int, groups: int, steps: int) -> None:
        self.epoch, self.groups, self.steps = epoch, groups, steps
        self._ranges = [_Range(group, 0, steps) for group in range(groups)]

    @property
    def done(self) -> int:
        """Parts that are noted."""
        return self.groups * self.steps - sum(part.left for part in self._ranges)

    @property
    def is_complete(self) -> bool:
        """Whether all parts are noted."""
        return all(not part.left for part in self._ranges)

    def is_left(self, group: int, part: int) -> bool:
        """Whether a part of a group is not noted yet."""
        return any(left.group == group and left.next <= part < left.end for left in self._ranges)

    def lease(self, worker: int) -> Lease | None:
        """A range for a worker that holds none, or nothing where nothing is left.

        A worker that asks has let go of what it held.
        """
        for part in self._ranges:
            part.holders.discard(worker)
        left = [number for number, part in enumerate(self._ranges) if part.left]
        if not left:
            return None
        free = [number for number in left if not self._ranges[number].holders]
        number = max(free or left, key=lambda n: self._ranges[n].left)
        chosen = self._ranges[number]
        if chosen.holders and chosen.left > 1:
            middle = chosen.end - chosen.left // 2
            self._ranges.append(_Range(chosen.group, middle, chosen.end))
            chosen.end = middle
            number, chosen = len(self._ranges) - 1, self._ranges[-1]
        chosen.holders.add(worker)
        return Lease(number=number, epoch=self.epoch, group=chosen.group, first=chosen.next, end=chosen.end)

    def is_wanted(self, number: int, part: int) -> bool:
        """Whether a part is the next of its range."""
        return number < len(self._ranges) and part == self._ranges[number].next < self._ranges[number].end

    def note(self, number: int, part: int) -> None:
        """A part that is wanted is done."""
        assert self.is_wanted(number, part), "asked for in front"
        self._ranges[number].next += 1

    def end_of(self, number: int) -> int:
        """Where a range ends by now."""
        return self._ranges[number].end if number < len(self._ranges) else 0

    def state(self) -> dict[str, Any]:
        """As JSON; who holds what is left out, since nobody holds anything when it is gone on from."""
        left = [[part.group, part.next, part.end] for part in self._ranges if part.left]
        return {"epoch": self.epoch, "groups": self.groups, "steps": self.steps, "left": left}

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Ledger":
        """The ledger with that state."""
        found = cls(state["epoch"], state["groups"], state["steps"])
        found._ranges = [_Range(*part) for part in state["left"]]
        return found
