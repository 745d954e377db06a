"""What a stage is given and what it gives back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.config import Config
from pipelines.receipt import Receipt
from pipelines.tracking import Run


@dataclass(frozen=True)
class Given:
    """What a stage works from.

    Attributes:
        inputs: The receipts of the stages before it, by name; a stage that the config leaves out is missing.
        run: The stage's MLflow run.
        made_from: What the stage's digest is computed from, by part.
    """

    config: Config
    inputs: Mapping[str, Receipt]
    run: Run
    made_from: Mapping[str, str]


@dataclass(frozen=True)
class Made:
    """What a stage made; becomes its receipt.

    Attributes:
        rows: Rows that it read, wrote or scored.
        result: Its noun as JSON.
        outputs: Files and folders that must still be there for the stage to count as done.
        lines: What a user is told.
    """

    rows: int
    result: dict[str, Any]
    outputs: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
