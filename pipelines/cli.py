"""What the jobs share: arguments, exit codes, and one clear line for whatever goes wrong.

The library is imported inside the guard, so that Ctrl-C in the second that this takes is answered as any other.

Exit codes: 0 done, 1 fault, 2 config, 3 refused, 130 interrupted, 143 ended.
"""

import argparse
import errno
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pipelines.errors import DataError, HeadraceError, LakeError, is_full_disk, one_line

if TYPE_CHECKING:
    from pipelines.config import Config

ASK_AGAIN_S = 5.0
_received: list[int] = []  # the signals that were to end this job


def parser(doc: str) -> argparse.ArgumentParser:
    """The arguments that every job takes."""
    found = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit codes: 0 done, 1 fault, 2 config error, 3 refused by the gate, 130 interrupted.",
    )
    found.add_argument("config", help="the workload's file, such as conf/digits.yaml")
    found.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override, train.epochs=1"
    )
    found.add_argument(
        "--properties-file", help="Spark's properties (default: conf/spark.conf); not under spark-submit"
    )
    return found


def run_job(doc: str, stages: Sequence[str] | None = None) -> int:
    """Run the stages, all that the config declares by default, and return the exit code."""
    arguments = parser(doc).parse_args()

    def work(config: "Config") -> None:
        from pipelines.run import declared, run_stages

        run_stages(config, list(stages) if stages else declared(config))

    return guarded(arguments, work)


def guarded(arguments: argparse.Namespace, work: Callable[["Config"], None]) -> int:
    """Load the config, do the work, and turn what goes wrong into one line and an exit code."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    signal.signal(signal.SIGINT, _on_sigint)
    signal.signal(signal.SIGALRM, _on_sigint)
    try:
        from pipelines import session
        from pipelines.config import load_config

        if arguments.properties_file:
            session.use_properties(arguments.properties_file)
        work(load_config(arguments.config, arguments.overrides))
    except KeyboardInterrupt:
        return _cut_off(signal.SIGINT)
    except SystemExit as error:
        return _cut_off(_received[0]) if _received else int(error.code or 0)
    except Exception as error:
        if _received:  # the JVM met the signal as well, and ended first
            return _cut_off(_received[0])
        known = explain(error)
        for line in str(known).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return known.exit_code
    finally:
        for number in (signal.SIGINT, signal.SIGALRM):  # what is left is to end, which takes a second
            signal.signal(number, signal.SIG_IGN)
        _say_no_more()
        if "pipelines.session" in sys.modules:
            sys.modules["pipelines.session"].stop_session()
    return 0


def _cut_off(number: int) -> int:
    """Say in one line that a signal ended the job; its exit code is that of a shell, 128 and the signal's number."""
    how = "interrupted" if number == signal.SIGINT else "ended"
    print(f"{how}; the same command goes on where it stopped", file=sys.stderr)
    return 128 + number


def _on_sigint(*_: object) -> None:
    _say_no_more()
    _received.append(signal.SIGINT)
    signal.setitimer(signal.ITIMER_REAL, ASK_AGAIN_S)  # some libraries swallow it, while they are imported
    raise KeyboardInterrupt


def _on_sigterm(*_: object) -> None:
    _say_no_more()
    _received.append(signal.SIGTERM)
    raise SystemExit(143)


def _say_no_more() -> None:
    """Keep libraries from logging, each with a traceback, that the JVM is gone."""
    logging.disable()


def explain(error: BaseException) -> HeadraceError:
    """The error as one that a user can read.

    A message of ours that was raised on a worker is found in Spark's report; an error that nobody foresaw is
    named in one line, and its traceback is kept in the lake.
    """
    from pipelines.config.load import lake_root

    if isinstance(error, HeadraceError):
        return error
    text = _whole_text(error)
    session = sys.modules.get("pipelines.session")
    lost = session.lost_jvm() if session else None
    text += f"\n{lost or ''}"
    if ours := re.search(r"pipelines\.errors\.\w+: (.+)", text):
        return DataError(ours.group(1).strip())
    if is_full_disk(text) or getattr(error, "errno", 0) == errno.ENOSPC:
        return LakeError(f"{lake_root()}: the disk is full; free space and run the same command again")
    if "OutOfMemoryError" in text:
        properties = session.properties_file() if session else None
        return LakeError(
            f"Spark has not enough memory: raise spark.driver.memory in {properties or 'its properties'}, on a cluster "
            "spark.executor.memory, and run the same command again"
        )
    if lost is not None:
        said = (
            f"its last error: {one_line(lost, limit=200)}"
            if lost
            else "it wrote no error; something may have killed it"
        )
        return LakeError(f"Spark's JVM ended: {said}; the same command goes on where it stopped")
    if "FAILED_READ_FILE" in text:
        file = re.search(r"file:/*(/\S+?)[.,]?\s", text)
        cause = re.search(r"Caused by: (?:[\w.$]+\.)?(\w+(?:Exception|Error)[^\n]*)", text)
        return DataError(
            f"{file.group(1) if file else 'a raw file'}: cannot be read: {cause.group(1) if cause else 'damaged'}; "
            "fetch the file again"
        )
    where = "its traceback could not be kept"
    try:
        log = lake_root() / "logs" / f"traceback-{os.getpid()}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(traceback.format_exception(error)) + text, encoding="utf-8")
        where = f"traceback: {log}"
    except OSError:
        pass
    return HeadraceError(f"unforeseen {type(error).__name__}: {one_line(_said(error), limit=300)}; {where}")


def _whole_text(error: BaseException) -> str:
    """The message of the error and of those that led to it; py4j's carry the Java stack."""
    parts = [_said(error), _said(getattr(error, "_origin", None) or "")]  # pyspark keeps py4j's error there
    cause = error.__cause__ or error.__context__
    return "\n".join(parts) + (f"\n{_whole_text(cause)}" if cause else "")


def _said(error: object) -> str:
    try:
        return str(error)
    except Exception:  # py4j asks the JVM for the words, which may be gone
        return type(error).__name__
