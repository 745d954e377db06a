"""Print the candidates of the last evaluation.

python jobs/leaderboard.py conf/digits.yaml --format json
"""

import json
import sys

from pipelines.cli import guarded, parser
from pipelines.config import Config
from pipelines.errors import LakeError
from pipelines.lake import receipt_path
from pipelines.leaderboard import table
from pipelines.receipt import read_receipt


def show(config: Config) -> None:
    """As a table, or as the JSON of the evaluation's result."""
    receipt = read_receipt(receipt_path(config.workload, "evaluate"))
    if receipt is None:
        raise LakeError(f"{config.workload}: wanted an evaluation, seen none; run `make run W={config.workload}`")
    print(json.dumps(receipt.result, indent=1) if arguments.format == "json" else table(receipt.result))


if __name__ == "__main__":
    jobs = parser(__doc__)
    jobs.add_argument("--format", choices=["text", "json"], default="text")
    arguments = jobs.parse_args()
    sys.exit(guarded(arguments, show))
