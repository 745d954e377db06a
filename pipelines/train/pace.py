"""When something is due that all ranks do together."""

import time

import torch
import torch.distributed as dist

_MOST_STEPS = 2**31


class Pace:
    """Tells alike on all ranks when something is due, by steps or by seconds.

    A step is the only clock that ranks share, so rank 0 turns seconds into steps, and looks again at that step.

    Args:
        every_s: Seconds between.
        device: Where collectives take place.
        every_steps: Steps between, instead of seconds.

    Attributes:
        steps_to_next: Steps from the last look to the next, the same on all ranks.
    """

    FIRST_LOOK_STEPS = 8

    def __init__(self, every_s: float, device: torch.device, *, every_steps: int | None = None) -> None:
        self._every_s, self._every_steps, self._device = every_s, every_steps, device
        self._from_step, self._since, self._next = 0, 0.0, 0
        self._seen: tuple[int, float] | None = None  # the last step, and when
        self.steps_to_next = 0

    def start(self, step: int, *, left: int = FIRST_LOOK_STEPS, counts_on: bool = False) -> None:
        """An epoch begins, or goes on, with `step`.

        Args:
            step: Of the epoch.
            left: Steps to its end; the first look is in front of the last of them.
            counts_on: With the steps and seconds of the epoch before; else anew.
        """
        now = time.monotonic()
        if counts_on and self._seen:
            last, when = self._seen
            self._from_step, self._next = self._from_step + step - last, self._next + step - last
            self._since += now - when
        else:
            self._from_step, self._since = step, now
            self._look_again(step, in_steps=self._every_steps or max(1, min(self.FIRST_LOOK_STEPS, left - 1)))
        self._seen = step, now

    def is_due(self, step: int) -> bool:
        """Whether it is due in front of `step`; collective, at steps that all ranks know."""
        self._seen = step, time.monotonic()
        if step < self._next:
            return False
        if self._every_steps:
            self._look_again(step, in_steps=self._every_steps)
            return True
        elapsed = self._seen[1] - self._since
        per_step = max(elapsed / (step - self._from_step), 1e-6)
        is_due = elapsed > self._every_s - per_step
        left = self._every_s - (0.0 if is_due else elapsed)
        told = torch.tensor([is_due, max(1, int(min(left / per_step, _MOST_STEPS)))], device=self._device)
        dist.broadcast(told, 0)
        self._look_again(step, in_steps=int(told[1]))
        if told[0]:
            self._from_step, self._since = step, time.monotonic()
        return bool(told[0])

    def _look_again(self, step: int, *, in_steps: int) -> None:
        self._next, self.steps_to_next = step + in_steps, in_steps
