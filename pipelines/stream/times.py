"""What a loader's threads spend their time on."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PARTS = ("read", "decode", "shuffle", "collate")


class LoaderTimes:
    """Seconds by part, added up over threads, so that they may exceed the time that went by.

    `read` is reading and decompressing, `decode` Arrow columns to arrays, `shuffle` rows into their order, `collate`
    arrays into a step's tensors.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._lock = threading.Lock()

    @contextmanager
    def measured(self, part: str) -> Iterator[None]:
        """Add the time of the body to a part."""
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[part] += time.perf_counter() - started
