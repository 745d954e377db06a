"""What a rank is told, and what it leaves in the job's folder. JSON files, read by launcher and ranks alike."""

import contextlib
import json
import socket
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pipelines.config.learning import Model, Train
from pipelines.config.strategies import Auto
from pipelines.features.fitted import FittedFeatures
from pipelines.lake import Contract, Snapshot
from pipelines.receipt import write_json
from pipelines.stream.plan import EpochPlan
from pipelines.train.diagnosis import RankTimes
from pipelines.train.heartbeat import Beat, Place

JOB_FILE = "job.json"
_CHECKPOINTS = "epoch-[0-9]*-step-[0-9]*"  # their folders


class EpochResult(BaseModel):
    """An epoch as the receipt of `train` holds it.

    Attributes:
        rows: Rows that were trained on, over all ranks.
        row_id_sum: Their row ids, summed modulo 2^64; with `rows`, equal to the Snapshot's or the epoch fails.
        loss: Mean training loss of a row, each taken before the step that it led to.
        metrics: Training metrics, and `validation_...` ones where there is a validation split.
        data_wait_share: Share of the epoch that the slowest rank waited for data.
        ranks: Where each rank's time went.
        verdict: What the epoch's time was spent on, in one line.
        exchange: Of ranks that are joined by no collective: what was sent and what became of it, how old it was or how far
            peers are apart, and rows that were trained on more than once.
    """

    model_config = ConfigDict(frozen=True)

    epoch: int
    rows: int
    row_id_sum: int
    loss: float
    metrics: dict[str, float]
    rows_per_s: float
    data_wait_share: float
    ranks: list[RankTimes] = []
    verdict: str = ""
    exchange: dict[str, float] = {}

    def story(self, epochs: int) -> str:
        """The epoch, one of so many, as a user reads it."""
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())
        what = f"loss {self.loss:.4f}, {metrics}, {self.rows_per_s:,.0f} rows/s"
        return f"epoch {self.epoch + 1}/{epochs}: {what}; {self.verdict}"


class TrainJob(BaseModel):
    """Everything that a rank needs.

    Attributes:
        class_weights: What a row of each class counts in the loss, 1 on average; empty for all alike.
        folder: Checkpoints, progress and errors go here; all ranks and the launcher see it.
        keep_checkpoints: How many checkpoints stay, the best one beside them.
        run_id: The MLflow run that takes the model; without one, the model is not logged.
    """

    model_config = ConfigDict(frozen=True)

    workload: str
    folder: Path
    model: Model
    train: Train
    seed: int
    snapshot: Snapshot
    validation: Snapshot | None
    fitted: FittedFeatures
    class_weights: tuple[float, ...] = ()
    tracking_uri: str
    run_id: str
    keep_checkpoints: int

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return EpochPlan((self.snapshot.rows,), self.train.num_lanes, self.train.batch_size).steps

    @property
    def path(self) -> Path:
        """This, for the ranks."""
        return self.folder / JOB_FILE

    @property
    def launcher_path(self) -> Path:
        """There while a launcher follows the ranks, and new each second."""
        return self.folder / "launcher"

    @property
    def contract(self) -> Contract:
        """Of the tables."""
        assert self.snapshot.contract is not None, "a feature table carries its contract"
        return self.snapshot.contract

    @property
    def result_path(self) -> Path:
        """Written by rank 0 when all is done."""
        return self.folder / "result.json"

    @property
    def epochs_path(self) -> Path:
        """A line an epoch, written by rank 0."""
        return self.folder / "epochs.jsonl"

    @property
    def progress_path(self) -> Path:
        """Where the ranks are inside the epoch."""
        return self.folder / "progress.json"

    @property
    def choice_path(self) -> Path:
        """What `train.strategy: auto` stands for on so many ranks, and why; it stays as long as the checkpoints."""
        return self.folder / f"strategy-{self.train.ranks}-ranks.json"

    @property
    def chosen(self) -> str:
        """Why `auto` took what it took, where it was asked for; nothing else."""
        is_chosen = isinstance(self.train.strategy, Auto) and self.choice_path.is_file()
        return str(json.loads(self.choice_path.read_bytes())["why"]) if is_chosen else ""

    @property
    def checkpointed(self) -> tuple[int, int] | None:
        """The epoch and step from which the job goes on, by its last checkpoint's name."""
        found = checkpoints(self.folder)
        return _place_of(found[-1]) if found else None

    @property
    def layer_times_path(self) -> Path:
        """Seconds of each layer, by which a pipeline is cut; it stays as long as the checkpoints."""
        return self.folder / "layers.json"

    @property
    def ended_path(self) -> Path:
        """There once the launcher ends the ranks: nobody starts one again."""
        return self.folder / "ended"

    @property
    def log_path(self) -> Path:
        """What the ranks printed."""
        return self.folder / "ranks.log"

    def beats(self) -> dict[int, Beat]:
        """The last beat of each rank that gave one."""
        found = {}
        for rank in range(self.train.ranks):
            with contextlib.suppress(OSError, ValueError):
                found[rank] = Beat.model_validate_json(self.beat_path(rank).read_bytes())
        return found

    def errors(self) -> list["RankError"]:
        """Why ranks ended, as far as they told."""
        paths = sorted(self.folder.glob("error-rank-*.json"))
        return [RankError.model_validate_json(path.read_bytes()) for path in paths]

    def remove_traces(self) -> None:
        """Remove what the ranks of an earlier start left beside checkpoints."""
        for path in (
            self.result_path,
            self.epochs_path,
            self.progress_path,
            self.ended_path,
            *self.folder.glob("*-rank-*.json"),
        ):
            path.unlink(missing_ok=True)

    def beat_path(self, rank: int) -> Path:
        """Sign of life of a rank."""
        return self.folder / f"beat-rank-{rank}.json"

    def lost_path(self, rank: int) -> Path:
        """How often the rank's process was lost, and started again."""
        return self.folder / f"lost-rank-{rank}.json"

    def lost(self) -> list[str]:
        """What the ranks' supervisors tell of processes that were lost."""
        paths = sorted(self.folder.glob("lost-rank-*.json"))
        return [str(line) for path in paths for line in json.loads(path.read_bytes())]

    def error_path(self, rank: int) -> Path:
        """Why a rank ended."""
        return self.folder / f"error-rank-{rank}.json"

    def leave_error(
        self, rank: int, place: Place, cause: Literal["known", "unforeseen", "ended"], message: str, *, exit_code: int
    ) -> None:
        """Leave, on the rank's own machine, why it ended; see RankError."""
        host = socket.gethostname()
        error = RankError(rank=rank, host=host, place=place, cause=cause, message=message, exit_code=exit_code)
        write_json(self.error_path(rank), error)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a job's folder, the last one last."""
    return sorted(folder.glob(_CHECKPOINTS), key=_place_of)


def _place_of(checkpoint: Path) -> tuple[int, int]:
    _, epoch, _, step = checkpoint.name.split("-")
    return int(epoch), int(step)


class Probed(BaseModel):
    """What a rank does alone.

    Attributes:
        base_mb: Its memory before it reads.
    """

    model_config = ConfigDict(frozen=True)

    rows_per_s: float
    base_mb: float


class RankError(BaseModel):
    """Why a rank ended.

    Attributes:
        place: Where it was then.
        cause: `known` for an error of ours, such as a damaged file, where starting again would not help; `ended` where
            the launcher ended the rank, since another had failed.
    """

    rank: int
    host: str
    place: Place
    cause: Literal["known", "unforeseen", "ended"]
    message: str
    exit_code: int


class TrainResult(BaseModel):
    """What rank 0 leaves when all is done.

    Attributes:
        best_epoch: The epoch whose weights were kept.
        seconds: Time in epochs, validation included.
        base_mb: Memory of rank 0 before it read.
        peak_mb: Its peak.
        sample: Tokens that the network writes, where it learned sequences.
        resumed_from: Epoch and step of the checkpoint that the run went on from; (0, 0) where there was none.
    """

    model_config = ConfigDict(frozen=True)

    epochs: list[EpochResult]
    best_epoch: int
    uri: str
    size_bytes: int
    parameters: int
    seconds: float
    resumed_from: tuple[int, int]
    base_mb: float
    peak_mb: float
    sample: str = ""
