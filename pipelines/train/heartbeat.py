"""What a rank tells the launcher while it works: that it is alive, and where it is."""

import contextlib
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pipelines.train.gauge import Gauge, Measured

BEAT_EVERY_S = 0.5
STARTING, LOGGING, ENDED = "start", "logging the model", "end"


class Place(BaseModel):
    """Where a rank's main thread is.

    Attributes:
        phase: What it is at.
        ticks: Goes up whenever the phase changes: where it stands still, the rank does not get on.
        lanes: Those that the rank reads.
        reading: The files that its threads read.
        staleness: Updates of the weights that a worker's gradients of the epoch are behind, the mean; None of others.
    """

    model_config = ConfigDict(frozen=True)

    phase: str = STARTING
    ticks: int = 0
    epoch: int = 0
    step: int = 0
    lanes: str = "none yet"
    reading: str = "nothing"
    staleness: float | None = None

    @property
    def num_lanes(self) -> int:
        """How many lanes the rank reads."""
        first, _, last = self.lanes.partition(" to ")
        return int(last) - int(first) + 1 if last else 0

    def __str__(self) -> str:
        where = f"epoch {self.epoch + 1}, step {self.step}, phase {self.phase}, lanes {self.lanes}"
        return f"{where}, reading {self.reading}"


class Beat(Measured):
    """One sign of life, with what the rank measured of itself.

    Attributes:
        count: Goes up with every beat; a rank whose count stands still is dead or stopped.
    """

    rank: int
    host: str
    pid: int
    count: int
    place: Place

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}, {self.place}"


class Heartbeat:
    """Writes a Beat twice a second, from a thread.

    Args:
        path: Of this rank's file; replaced whole.
        rank: This rank.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self._path, self._rank = path, rank
        self.place: Callable[[], Place] = Place
        self._phases: Callable[[], Mapping[str, float]] = dict
        self._gauge, self._measured = Gauge(), Measured()
        self._leave: Callable[[], None] = lambda: None
        self._count, self._lock = 0, threading.Lock()
        self._wakes, self._wake = socket.socketpair()
        self._is_ended = False
        self._thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)
        self._thread.start()

    def follow(self, place: Callable[[], Place], phases: Callable[[], Mapping[str, float]]) -> None:
        """From now on tell what `place` tells, and `phases`, the seconds of the epoch by phase."""
        self.place, self._phases = place, phases
        self._beat(place())

    def end(self) -> None:
        """Leave the last beat."""
        self._is_ended = True
        self._wake.send(b"\0")
        self._thread.join()
        self._beat(self.place().model_copy(update={"phase": ENDED}))

    def on_sigterm(self, leave: Callable[[], None]) -> None:
        """Call `leave` from the thread when SIGTERM comes; the main thread may be deep inside a collective then."""
        self._leave = leave
        signal.signal(signal.SIGTERM, lambda *_: None)
        self._wake.setblocking(False)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)

    def _beat_on(self) -> None:
        while not self._is_ended:
            self._beat(self.place())
            if select.select([self._wakes], [], [], BEAT_EVERY_S)[0] and signal.SIGTERM in self._wakes.recv(64):
                self._leave()

    def _beat(self, place: Place) -> None:
        with self._lock:
            self._count += 1
            with contextlib.suppress(OSError):  # a process without a free file descriptor still gives signs of life
                at = {"ticks": place.ticks, "epoch": place.epoch, "step": place.step}
                self._measured = self._gauge.read(**at, phases=dict(self._phases()))
            beat = Beat(
                rank=self._rank,
                host=socket.gethostname(),
                pid=os.getpid(),
                count=self._count,
                place=place,
                **self._measured.model_dump(),
            )
            temporary = self._path.with_suffix(".tmp")
            with contextlib.suppress(OSError):  # of a full disk others tell
                temporary.write_text(beat.model_dump_json(), encoding="utf-8")
                temporary.replace(self._path)
