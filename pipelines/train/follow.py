"""What the launcher does while the ranks work: it shows how far they are, and passes on what they tell."""

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping

from pipelines import session
from pipelines.progress import Progress
from pipelines.train.board import look
from pipelines.train.heartbeat import Beat
from pipelines.train.job import EpochResult, TrainJob
from pipelines.train.watch import Watch

LOOK_EVERY_S = 1.0


class Follower:
    """While the body runs: shows progress, passes each epoch on, and watches the ranks.

    Args:
        job: Whose ranks.
        on_epoch: Called with each epoch, in the follower's thread.
        on_alert: Called with what is wrong with a rank, once for each kind of trouble, in the follower's thread.
        tell: Called with what a user is told at once, in the follower's thread.
        should_end: Asked whether the ranks are to be ended.

    Attributes:
        verdict: Why the ranks were ended, where the watch ended them.
        is_ended: Whether they were ended because `should_end` said so.
    """

    def __init__(
        self,
        job: TrainJob,
        *,
        on_epoch: Callable[[EpochResult], None],
        on_alert: Callable[[str], None],
        tell: Callable[[str], None],
        should_end: Callable[[], bool],
    ) -> None:
        self._job, self._on_epoch, self._on_alert, self._should_end = job, on_epoch, on_alert, should_end
        self._tell = tell
        self._lost = Counter[str]()  # processes that were lost and told of, of this start
        self._is_choice_told = False
        self._looked = 0.0
        self._seen: set[tuple[int, str]] = set()  # ranks and their troubles at the last look
        self._told: set[tuple[int, str]] = set()
        self._watch: Watch | None = None
        self._ending = threading.Lock()
        self._passed_on = 0
        self._done = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._follow, name="follow", daemon=True)
        self.verdict, self.is_ended = "", False

    def begin(self) -> Watch:
        """Watch the ranks of a new start; what the last one left goes, and is not ended any more."""
        with self._ending:
            self._job.remove_traces()
            self.verdict, self._watch = "", Watch(self._job)
            return self._watch

    def __enter__(self) -> "Follower":
        self._job.launcher_path.touch()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._job.launcher_path.unlink(missing_ok=True)
        if self._error is not None and kind is None:
            raise self._error

    def _follow(self) -> None:
        with Progress("train", unit="steps") as progress:
            while True:
                ended = self._done.wait(0.2)
                try:
                    self._tell_news()
                    self._pass_on()
                    self._look_if_due()
                except Exception as error:  # the training goes on; raised when it is done
                    self._error = self._error or error
                if ended:
                    return
                with self._ending:
                    self._end_if_due()
                with contextlib.suppress(OSError, ValueError):
                    at = json.loads(self._job.progress_path.read_text(encoding="utf-8"))
                    if at["epoch"] < self._passed_on:
                        continue
                    progress.show(at["step"], at["steps"], f"epoch {at['epoch'] + 1}, loss {at['loss']:.4f}")

    def _tell_news(self) -> None:
        """What `auto` took, and processes that were lost and started again by themselves."""
        if not self._is_choice_told and (chosen := self._job.chosen):
            self._is_choice_told = True
            self._tell(f"strategy {chosen}")
        try:
            lost = Counter(self._job.lost())
        except OSError:  # a new start removes what the last one left
            return
        for text in (lost - self._lost).elements():
            self._tell(text)
            self._on_alert(text)
        self._lost = lost

    def _look_if_due(self) -> None:
        """Tell of a rank that two looks in turn find in trouble; what lasts for a moment is none.

        A rank that dies takes the others with it; the launcher tells which was the first.
        """
        if time.monotonic() - self._looked < LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        self._job.launcher_path.touch()
        alerts = {(alert.rank, alert.kind): alert.text for alert in look(self._job).alerts if alert.kind != "dead"}
        for trouble in (alerts.keys() & self._seen) - self._told:
            self._on_alert(alerts[trouble])
        self._told |= alerts.keys() & self._seen
        self._seen = set(alerts)

    def _end_if_due(self) -> None:
        if self._watch is None:
            return
        self.is_ended = self.is_ended or self._should_end()
        self.verdict = self.verdict or ("" if self.is_ended else self._watch.look())
        if self.is_ended or self.verdict:  # each time: a rank that is still starting is met once it is there
            self._watch.end_local_ranks()
            if not session.master().startswith("local") and (spark := session.active_session()) is not None:
                spark.sparkContext.cancelAllJobs()

    def _pass_on(self) -> None:
        try:
            lines = self._job.epochs_path.read_text(encoding="utf-8").splitlines(keepends=True)
        except FileNotFoundError:
            return
        for line in [line for line in lines if line.endswith("\n")][self._passed_on :]:
            self._passed_on += 1
            self._on_epoch(EpochResult.model_validate_json(line))


def metrics_of(epoch: EpochResult, beats: Mapping[int, Beat]) -> dict[str, float]:
    """As MLflow shows them, grouped by what stands before the slash; `beats` are the ranks' last."""
    found = {
        "train/loss": epoch.loss,
        "train/rows_per_s": epoch.rows_per_s,
        "train/data_wait_share": epoch.data_wait_share,
        "receipt/rows": epoch.rows,
    }
    found |= {_metric_name(name): value for name, value in epoch.metrics.items()}
    found |= {f"exchange/{name}": value for name, value in epoch.exchange.items()}
    for rank, times in enumerate(epoch.ranks):
        found |= {f"time_rank_{rank}/{phase}_share": times.share(phase) for phase in times.phases}
        found |= {f"loader_rank_{rank}/{part}_s": seconds for part, seconds in times.loader.items()}
        found[f"exchange_rank_{rank}/sent_mb"] = times.sent_bytes / 1e6
        found[f"exchange_rank_{rank}/received_mb"] = times.received_bytes / 1e6
        found[f"exchange_rank_{rank}/waited_s"] = times.phases["communication"]
        if times.staleness is not None:
            found[f"exchange_rank_{rank}/staleness"] = times.staleness
    for rank, beat in beats.items():
        found |= {f"rank_{rank}/memory_mb": beat.memory_mb, f"rank_{rank}/step_ms": 1000 * beat.step_s}
    return found


def _metric_name(name: str) -> str:
    return f"validation/{name.removeprefix('validation_')}" if name.startswith("validation_") else f"train/{name}"
