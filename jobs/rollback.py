"""Move the champion alias back to the version before, or to a named one.

python jobs/rollback.py conf/digits.yaml --to 2
"""

import sys

from pipelines.cli import guarded, parser
from pipelines.config import Config
from pipelines.register import rollback


def move(config: Config) -> None:
    """Move, and say from where to where."""
    before, now = rollback(config.workload, to=arguments.to)
    print(
        f"champion of {config.workload}: version {before} -> version {now}; `make score W={config.workload}` scores anew"
    )


if __name__ == "__main__":
    jobs = parser(__doc__)
    jobs.add_argument("--to", type=int, help="the version that becomes champion (default: the one before)")
    arguments = jobs.parse_args()
    sys.exit(guarded(arguments, move))
