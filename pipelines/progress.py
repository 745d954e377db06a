"""Progress of long work: a bar in a terminal, a plain line now and then in a log."""

import sys
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

LINE_EVERY_S = 15.0


class Progress:
    """Shows how far a piece of work is.

    In a terminal a bar that vanishes when the work ends; elsewhere a line every `LINE_EVERY_S` seconds, so
    short work leaves no line at all.
    """

    def __init__(self, what: str, *, unit: str) -> None:
        self.what, self.unit = what, unit
        self._last_line = time.monotonic()
        self._bar = tqdm(desc=what, unit=f" {unit}", leave=False, file=sys.stderr) if sys.stderr.isatty() else None

    def show(self, done: int, total: int, note: str = "") -> None:
        """Show `done` of `total`, with a note behind it."""
        if self._bar is not None:
            self._bar.total, self._bar.n = total, done
            self._bar.set_postfix_str(note, refresh=True)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            share = f" ({done / total:.0%})" if total else ""
            print(f"  {self.what}: {done:,} of {total:,} {self.unit}{share} {note}".rstrip(), flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def say(text: str, *, file: TextIO | None = None) -> None:
    """Print a line of the run's story at once, whole even beside a bar."""
    out = file or sys.stdout
    tqdm.write(text, file=out)
    out.flush()
