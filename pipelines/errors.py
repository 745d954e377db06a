"""The few exceptions a user can meet.

Each message says where, what was wanted, what was seen and what to do, in one line, and each
class carries the exit code that the jobs document: 2 for a config, 3 for a refusal, 1 for a fault.
"""


class HeadraceError(Exception):
    """A fault with a message fit for a user. Exit code 1."""

    exit_code = 1


class ConfigError(HeadraceError):
    """The config, an override or a variable is wrong; nothing was started. Exit code 2."""

    exit_code = 2


class DataError(HeadraceError):
    """The data is not what the config declares. Exit code 1."""


class LakeError(HeadraceError):
    """A table, file or folder of the lake cannot be used as asked. Exit code 1."""


class TrainingError(HeadraceError):
    """A rank failed, or an epoch's receipt does not agree with its Snapshot. Exit code 1."""


class TrackingError(HeadraceError):
    """MLflow cannot be reached or does not hold what was asked of it. Exit code 1."""


class Refused(HeadraceError):
    """The gate refused the candidate; the champion stays. Exit code 3."""

    exit_code = 3


def is_full_disk(text: str) -> bool:
    """Whether an error's message says that a disk is full; SQLite has words of its own."""
    return "No space left on device" in text or "disk is full" in text


def one_line(text: str, *, limit: int = 500) -> str:
    """`text` folded to one line of at most `limit` characters."""
    folded = " ".join(text.split())
    return folded if len(folded) <= limit else folded[: limit - 1] + "…"
