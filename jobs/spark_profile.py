"""Say what Spark did in the last run of a workload's stages: shuffles, spills and skew of each stage, from its event log.

python jobs/spark_profile.py conf/digits.yaml --format json
"""

import sys
from pathlib import Path

from pipelines.cli import guarded, parser
from pipelines.config import Config
from pipelines.profile import as_text, latest_log, read_profile


def show(config: Config) -> None:
    """As text, or as JSON."""
    profile = read_profile(Path(arguments.log) if arguments.log else latest_log(config.workload))
    print(profile.model_dump_json(indent=1) if arguments.format == "json" else as_text(profile))


if __name__ == "__main__":
    jobs = parser(__doc__)
    jobs.add_argument("--log", help="another event log, such as a cluster's (default: the workload's latest)")
    jobs.add_argument("--format", choices=["text", "json"], default="text")
    arguments = jobs.parse_args()
    sys.exit(guarded(arguments, show))
