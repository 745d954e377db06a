"""Say what a training run will do, before it does; refuse what stands in its way, with the command that mends it.

spark-submit --properties-file conf/spark.conf jobs/plan.py conf/digits.yaml --format json
"""

import sys

from pipelines.cli import guarded, parser
from pipelines.config import Config
from pipelines.dry_run import as_text, dry_run, pinned
from pipelines.errors import Refused
from pipelines.lake import Snapshot


def show(config: Config) -> None:
    """As text, or as JSON; refusals behind it."""
    snapshot = Snapshot.open(arguments.table, version=arguments.version) if arguments.table else pinned(config)
    plan = dry_run(config, snapshot)
    print(plan.model_dump_json(indent=1) if arguments.format == "json" else as_text(plan))
    if plan.refusals:
        raise Refused("\n".join(plan.refusals))


if __name__ == "__main__":
    jobs = parser(__doc__)
    jobs.add_argument("--table", help="another Delta table in place of the workload's own")
    jobs.add_argument("--version", type=int, help="its version (default: the latest)")
    jobs.add_argument("--format", choices=["text", "json"], default="text")
    arguments = jobs.parse_args()
    sys.exit(guarded(arguments, show))
