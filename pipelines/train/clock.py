"""Where a rank's time goes: each moment of an epoch belongs to one phase."""

import time

import torch
from torch import nn

from pipelines.train.diagnosis import busy_seconds

PHASES = ("data", "copy", "forward", "backward", "communication", "optimizer", "other")
_PASSES = ("forward", "backward")
SAMPLED_EVERY = 16  # on a GPU work is asynchronous; one step in so many is waited for, phase by phase


class StepClock:
    """Adds up seconds by phase.

    `data` is waiting for a batch, `copy` its way to the device, `communication` the part of the exchange between ranks
    that no computation hides, `other` what is left: tallies, checkpoints, progress.

    Args:
        device: Where the rank computes.

    Attributes:
        waits_inside: Whether ranks wait for each other inside the passes through the network. On a CPU what a pass takes
            beyond its thread's processor time is then `communication`; so is waiting for a core, where there are too few.
    """

    def __init__(self, device: torch.device) -> None:
        self.phase, self.epoch, self.step, self.ticks = "start", 0, 0, 0
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.waits_inside = False
        self._device, self._is_cuda = device, device.type == "cuda"
        self._since = self._last_gradient = time.perf_counter()
        self._processor_since = 0.0

    def follow(self, network: nn.Module) -> None:
        """Behind a network's last gradient the backward pass only waits for the exchange."""
        for parameter in network.parameters():
            parameter.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call]

    @property
    def busy(self) -> float:
        """Seconds of the epoch so far in which this rank did not wait for others."""
        return busy_seconds(self.seconds)

    def start(self, epoch: int, step: int) -> None:
        """An epoch begins, or goes on, with `step`."""
        self.epoch, self.step, self.phase = epoch, step, "data"
        self.ticks += 1
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._since = time.perf_counter()

    def enter(self, phase: str) -> None:
        """The phase under way ends, and another begins."""
        if self._is_cuda and self.step % SAMPLED_EVERY == 0:
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self.phase in self.seconds:
            self.seconds[self.phase] += now - self._since
        if self.phase == "backward" and self._last_gradient > self._since:
            hidden = now - self._last_gradient
            self.seconds["backward"] -= hidden
            self.seconds["communication"] += hidden
        if self.waits_inside and not self._is_cuda:
            processor = time.thread_time()
            if self.phase in _PASSES:
                waited = max(0.0, now - self._since - (processor - self._processor_since))
                self.seconds[self.phase] -= waited
                self.seconds["communication"] += waited
            self._processor_since = processor
        self.phase, self._since = phase, now
        self.ticks += 1

    def _on_gradient(self, _: torch.Tensor) -> None:
        if self._is_cuda and self.step % SAMPLED_EVERY == 0:
            torch.cuda.synchronize(self._device)
        self._last_gradient = time.perf_counter()
