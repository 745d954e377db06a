"""Show a training under way: where each rank is, how fast, what it waits for, and which one is in trouble.

python jobs/watch.py conf/mnist.yaml
python jobs/watch.py conf/mnist.yaml --once --format json
"""

import contextlib
import sys

from pipelines.cli import guarded, parser
from pipelines.config import Config
from pipelines.errors import LakeError
from pipelines.train.board import job_of_run, latest_job, look
from pipelines.train.job import TrainJob
from pipelines.train.live import as_text, watch

EXIT_CODES = {"running": 0, "ended": 0, "failed": 1}


def show(config: Config) -> None:
    """The workload's training, or that of a run."""
    job = _of_run(arguments.run) if arguments.run else latest_job(config.workload)
    if job is None:
        raise LakeError(
            f"wanted a training of {f'run {arguments.run}' if arguments.run else config.workload}, seen none in the lake; "
            "start one: make train"
        )
    as_json = arguments.format == "json"
    with contextlib.suppress(KeyboardInterrupt):
        board = look(job) if arguments.once else watch(job, as_json=as_json)
        if arguments.once:
            print(board.model_dump_json(indent=1) if as_json else as_text(board))
        sys.exit(3 if arguments.once and board.alerts else EXIT_CODES[board.state])


def _of_run(run_id: str) -> TrainJob | None:
    if job := job_of_run(run_id):
        return job
    from pipelines import tracking  # a second, and MLflow three more

    return job_of_run(tracking.training_record(run_id).run_id)


if __name__ == "__main__":
    jobs = parser(__doc__)
    jobs.epilog = (
        "Exit codes: 0 the run ended well, or with --once gets on; 1 it failed, or there is none; 2 config error; 3 with "
        "--once: a rank is dead, silent, stalled or slow."
    )
    jobs.add_argument("--run", help="MLflow's id of the run of the train stage, or of the pipeline run above it")
    jobs.add_argument("--once", action="store_true", help="one look")
    jobs.add_argument("--format", choices=["text", "json"], default="text", help="json: a line each second")
    arguments = jobs.parse_args()
    sys.exit(guarded(arguments, show))
