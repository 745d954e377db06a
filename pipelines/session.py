"""The only SparkSession builder, and progress of what Spark works on.

Under spark-submit the JVM is there already and its properties file counts. Otherwise the JVM is started
here, with `conf/spark.conf` (or `--properties-file`), and what it writes to stderr goes to a log file.
"""

import contextlib
import hashlib
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import psutil

from pipelines.config import Config
from pipelines.config.load import lake_root
from pipelines.errors import ConfigError, LakeError, one_line
from pipelines.lake import events_path
from pipelines.progress import Progress

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

PACKAGE = Path(__file__).resolve().parent
STOP_S = 10.0
KEPT_EVENT_LOGS = 5  # of each workload
SHUFFLE_PARTITIONS = "spark.sql.shuffle.partitions"
_PARTITION_BYTES = 32 << 20  # of files, which are a few times as much in memory
DEFAULT_PROPERTIES = PACKAGE.parent / "conf" / "spark.conf"
_properties_file = DEFAULT_PROPERTIES
_log_begin = 0  # of what this process's JVM writes


def use_properties(path: str | Path) -> None:
    """Take Spark's properties from `path` when a JVM is started here.

    Raises:
        ConfigError: There is no such file.
    """
    global _properties_file
    if not Path(path).is_file():
        raise ConfigError(f"--properties-file: wanted a file, seen none at {path}")
    _properties_file = Path(path)


def properties_file() -> Path | None:
    """The file that Spark's properties are taken from; None where spark-submit was told."""
    return None if under_spark_submit() else _properties_file


def under_spark_submit() -> bool:
    """Whether this process was started by spark-submit."""
    return "PYSPARK_GATEWAY_PORT" in os.environ


def master() -> str:
    """The master that a session started now would have, without starting one."""
    if spark := active_session():
        return str(spark.sparkContext.master)
    return _properties().get("spark.master", "local[*]")


def _properties() -> dict[str, str]:
    """What the properties file says."""
    lines = [line.split(maxsplit=1) for line in _properties_file.read_text(encoding="utf-8").splitlines()]
    return {line[0]: line[1].strip() for line in lines if len(line) == 2}


def active_session() -> "SparkSession | None":
    """The session that is up in this process, if one is."""
    if "pyspark" not in sys.modules:
        return None
    from pyspark.sql import SparkSession

    return SparkSession.getActiveSession()


def get_session(config: Config, *, keeps_events: bool = True) -> "SparkSession":
    """The process's one session, started when first asked for.

    Args:
        config: Whose work it is for.
        keeps_events: Whether Spark logs what it does, for `make profile`.

    Raises:
        LakeError: The master is not local and the config does not say that all nodes see the lake.
    """
    if spark := active_session():
        return spark
    # Python workers and the driver must be the same environment; else PATH's python3 is taken.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    from pyspark.sql import SparkSession

    if not under_spark_submit():
        if not _properties_file.is_file():
            raise ConfigError(
                f"{_properties_file}: wanted Spark's properties, seen none; start from the project's folder or give "
                "--properties-file"
            )
        check_master(config, master())
        os.environ["PYSPARK_SUBMIT_ARGS"] = f"--properties-file {shlex.quote(str(_properties_file))} pyspark-shell"
    builder = SparkSession.builder.appName(f"headrace {config.workload}")
    builder = builder.config("spark.executorEnv.PYTHONPATH", str(_packaged()))  # not read in local mode
    if keeps_events and not under_spark_submit() and "spark.eventLog.enabled" not in _properties():
        for key, value in _event_log(config.workload).items():
            builder = builder.config(key, value)
    _keep_own_sigint()
    _hush_lost_jvm()
    with _quiet_start():
        spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    chosen = str(spark.sparkContext.master)
    try:
        check_master(config, chosen)
    except LakeError:
        spark.stop()
        raise
    if not spark.sparkContext.getConf().contains(SHUFFLE_PARTITIONS):
        spark.conf.set(SHUFFLE_PARTITIONS, str(max(4, 2 * spark.sparkContext.defaultParallelism)))
    return spark


def local_session() -> "SparkSession":
    """The process's session, whoever started it; or else a local one that knows no lake, for rows in memory."""
    from pyspark.sql import SparkSession

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    # Read when a JVM is started; options of a builder would change a session that is up.
    os.environ.setdefault(
        "PYSPARK_SUBMIT_ARGS",
        "--master local[*] --name headrace --conf spark.ui.enabled=false --conf spark.ui.showConsoleProgress=false "
        "--conf spark.log.level=ERROR pyspark-shell",
    )
    return SparkSession.builder.getOrCreate()


def size_shuffles(spark: "SparkSession", num_bytes: int) -> None:
    """Raise the partitions of a shuffle to what so many bytes of files need, unless Spark's properties set them.

    Spark's adaptive execution merges partitions that turn out small, but never makes more of them.
    """
    wanted = -(-num_bytes // _PARTITION_BYTES)
    is_set = spark.sparkContext.getConf().contains(SHUFFLE_PARTITIONS)
    if not is_set and wanted > int(spark.conf.get(SHUFFLE_PARTITIONS) or 0):
        spark.conf.set(SHUFFLE_PARTITIONS, str(wanted))


def _event_log(workload: str) -> dict[str, str]:
    """Properties that have Spark log its events, as plain JSON lines in one file; old ones are removed."""
    folder = events_path(workload)
    folder.mkdir(parents=True, exist_ok=True)
    logs = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
    for path in logs[: -KEPT_EVENT_LOGS + 1]:
        path.unlink(missing_ok=True)
    return {
        "spark.eventLog.enabled": "true",
        "spark.eventLog.dir": folder.as_uri(),
        "spark.eventLog.compress": "false",
        "spark.eventLog.rolling.enabled": "false",
    }


def _keep_own_sigint() -> None:
    """Keep Spark from installing its handler for Ctrl-C, which calls the JVM in the middle of another call."""
    from pyspark.core import context

    vars(context)["signal"] = SimpleNamespace(SIGINT=signal.SIGINT, signal=lambda *_: None)


def check_master(config: Config, chosen: str) -> None:
    """Refuse a lake on a local path under a master that is not local.

    Raises:
        LakeError: `lake.shared` is not set.
    """
    if not chosen.startswith("local") and not config.lake.shared:
        raise LakeError(
            f"HEADRACE_LAKE {lake_root()}: wanted a lake that all nodes of {chosen} see, seen a local path; mount it on "
            "all nodes and set lake.shared: true"
        )


def result_bytes(spark: "SparkSession") -> int:
    """What all answers of a job may hold in the driver (`spark.driver.maxResultSize`)."""
    limit = spark.sparkContext.getConf().get("spark.driver.maxResultSize", "1g")
    found: int = spark.sparkContext._jvm.org.apache.spark.network.util.JavaUtils.byteStringAsBytes(limit)  # type: ignore[union-attr]
    return found or sys.maxsize  # 0 is no limit


def is_refusal(error: Exception) -> bool:
    """Whether Spark says by it that parameters or input do not suit MLlib."""
    marks = ("requirement failed", "USER_RAISED_EXCEPTION")
    return any(mark in str(error) for mark in marks) or "IllegalArgument" in type(error).__name__


def _hush_lost_jvm() -> None:
    """Keep pyspark's threads from telling, each with a traceback, that the JVM is gone; whoever asks it is told."""
    from pyspark.accumulators import AccumulatorServer

    AccumulatorServer.handle_error = lambda *_: None  # type: ignore[method-assign]
    logging.getLogger().addFilter(_is_not_py4js)  # which it tells the root logger, and raises as well


def _is_not_py4js(record: logging.LogRecord) -> bool:
    return record.module not in ("clientserver", "java_gateway")


def lost_jvm() -> str | None:
    """Why the JVM of this process ended by itself: that it had not enough memory, or else its last error, "" where it
    wrote none; None while it runs."""
    process = None
    if "pyspark" in sys.modules:
        from pyspark import SparkContext

        process = getattr(SparkContext._gateway, "proc", None)  # not under spark-submit
    if process is None:
        return None
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1)  # who asked it may be told sooner
    if process.returncode is None:
        return None
    return _last_error(_jvm_log())


def _last_error(text: str) -> str:
    """The last error of a JVM's log; one of memory before those that follow from it."""
    errors = re.findall(r"\b\w+\.[\w.]*(?:Error|Exception)\b(?:: .*)?", text)
    return next((error for error in reversed(errors) if "OutOfMemoryError" in error), errors[-1] if errors else "")


def stop_session() -> None:
    """Stop the session, if one is up, and the JVM that was started for it."""
    spark = None
    with contextlib.suppress(Exception):  # the JVM may be gone already, or in the middle of an answer
        spark = active_session()
    if spark:
        # In a thread of its own, which has its own connection: this one's may wait for an interrupted job.
        stop = threading.Thread(target=_stop, args=(spark,), daemon=True)
        stop.start()
        stop.join(STOP_S)
        _forget_jvm()
    # A JVM that was interrupted while it started would wait for ever.
    jvms = [child for child in psutil.Process().children(recursive=True) if child.name() == "java"]
    for jvm in jvms:
        jvm.terminate()
    for jvm in psutil.wait_procs(jvms, timeout=STOP_S)[1]:
        jvm.kill()


def _stop(spark: "SparkSession") -> None:
    with contextlib.suppress(Exception):
        spark.stop()


def _forget_jvm() -> None:
    """The next session of this process starts another JVM."""
    from pyspark import SparkContext

    SparkContext._gateway = SparkContext._jvm = None


def _packaged() -> Path:
    """A zip of the package in the lake, for the Python processes of other nodes.

    TorchDistributor starts torchrun as a new process, which sees neither --py-files nor addPyFile.
    """
    sources = sorted(PACKAGE.rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    target = lake_root() / "code" / f"headrace-{digest}.zip"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent)
        with os.fdopen(handle, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sources:
                archive.write(path, path.relative_to(PACKAGE.parent))
        os.replace(temporary, target)
    return target


def _log_path() -> Path:
    return lake_root() / "logs" / "spark.log"


def _jvm_log() -> str:
    """What this process's JVM wrote; nothing where it was not told to write there."""
    with contextlib.suppress(OSError), _log_path().open("rb") as log:
        log.seek(_log_begin)
        return log.read().decode(errors="replace")
    return ""


@contextlib.contextmanager
def _quiet_start() -> Iterator[None]:
    """Send what the new JVM writes to stderr to a log file, and show that file's errors if it does not start."""
    if under_spark_submit():
        yield
        return
    global _log_begin
    log = _log_path()
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.is_file() and log.stat().st_size > 10 << 20:
        log.unlink()
    sys.stderr.flush()
    saved = os.dup(2)
    with log.open("ab") as file:
        _log_begin = file.tell()
        os.dup2(file.fileno(), 2)
        try:
            yield
        except Exception as error:
            seen = [
                line for line in _jvm_log().splitlines() if "rror" in line or "xception" in line or "not found" in line
            ]
            raise LakeError(
                f"Spark did not start: {one_line(' | '.join(seen[:3]) or str(error))}; its whole log: {log}"
            ) from None
        finally:
            os.dup2(saved, 2)
            os.close(saved)


@contextlib.contextmanager
def spark_progress(spark: "SparkSession", what: str) -> Iterator[None]:
    """Show how many tasks of the running Spark jobs are done, while the body runs; `what` describes its jobs."""
    tracker = spark.sparkContext.statusTracker()
    outside = spark.sparkContext.getLocalProperty("spark.job.description")
    spark.sparkContext.setJobDescription(what)
    done = threading.Event()

    def watch() -> None:
        with Progress(what, unit="tasks") as progress:
            finished = 0
            while not done.wait(0.5):
                with contextlib.suppress(Exception):  # a stage may end between the two questions
                    stages = [tracker.getStageInfo(stage) for stage in tracker.getActiveStageIds()]
                    active = [stage for stage in stages if stage]
                    finished = sum(stage.numCompletedTasks for stage in active)
                    if active:
                        progress.show(finished, sum(stage.numTasks for stage in active))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=2)
        spark.sparkContext.setLocalProperty("spark.job.description", outside)  # type: ignore[arg-type]
