"""A rank as a process that keeps a child: what is killed is the child, and the launcher's ranks all stay."""

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable

from pipelines.config.strategies import num_servers
from pipelines.receipt import write_json
from pipelines.train.heartbeat import ENDED, Beat, Place
from pipelines.train.job import TrainJob

LOOK_EVERY_S = 0.1
GRACE_S = 3.0  # for a child that is left when all is done
AGAIN = 75  # a child's exit code: start me again (EX_TEMPFAIL of sysexits.h)
_SHARE = 0.5  # of train.timeout_s without a sign of life, and the child is ended


def supervise(job: TrainJob, rank: int, work: Callable[[], int]) -> int:
    """Do `work` in a child, again where it is lost, up to `train.max_restarts` times. Returns the exit code.

    A worker that is lost for good is left alone: the others do what it had not done. A server is not: the run fails.
    The child is forked, since importing torch costs seconds.
    """
    lost: list[str] = []
    while True:
        child = os.fork()
        if not child:
            code = 1
            try:
                code = work()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = _watched(job, rank, child)
        if job.result_path.is_file():
            return 0
        if code >= 0 and code != AGAIN:
            return code
        if job.ended_path.is_file():
            return 1
        is_last = len(lost) == job.train.max_restarts
        why = "weights are lost that others held" if code == AGAIN else f"ended by signal {-code}"
        beat = job.beats().get(rank)
        lost.append(
            f"{beat or f'rank {rank} on {socket.gethostname()}'}: {why}; {'given up' if is_last else 'started again'}"
        )
        write_json(job.lost_path(rank), lost)
        if is_last and rank < num_servers(job.train.strategy):
            job.leave_error(rank, beat.place if beat else Place(), "unforeseen", why, exit_code=1)
            return 1
        if is_last:
            return _wait_for_the_others(job, rank)


def _watched(job: TrainJob, rank: int, child: int) -> int:
    """Wait for the child, and end it where it gives no sign of life, is left when all is done, or the launcher ends all.

    Its exit code, or less than 0 by a signal.
    """
    path, limit = job.beat_path(rank), _SHARE * job.train.timeout_s
    count, until = -1, time.monotonic() + limit
    is_over = False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if not is_over and job.result_path.is_file():
            is_over, until = True, time.monotonic() + GRACE_S
        with contextlib.suppress(OSError, ValueError):
            beat = Beat.model_validate_json(path.read_bytes())
            if not is_over and beat.pid == child and beat.count != count:
                count, until = beat.count, time.monotonic() + limit
        if time.monotonic() > until or job.ended_path.is_file():
            os.kill(child, signal.SIGKILL)
        time.sleep(LOOK_EVERY_S)


def _wait_for_the_others(job: TrainJob, rank: int) -> int:
    beat = Beat(rank=rank, host=socket.gethostname(), pid=os.getpid(), count=-1, place=Place(phase=ENDED))
    write_json(job.beat_path(rank), beat)
    while not job.result_path.is_file():
        if job.ended_path.is_file():
            return 1
        time.sleep(LOOK_EVERY_S)
    return 0
