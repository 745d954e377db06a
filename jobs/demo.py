"""Run the whole chain on the embedded digits, and say what came of it and where it lies.

python jobs/demo.py conf/digits.yaml
"""

import sys
import time

from pipelines import tracking
from pipelines.cli import guarded, parser
from pipelines.config import Config
from pipelines.config.load import lake_root
from pipelines.leaderboard import table
from pipelines.run import declared, run_stages


def demo(config: Config) -> None:
    """Run, then tell."""
    started = time.monotonic()
    receipts = run_stages(config, declared(config))
    evaluation, register, score = (receipts[name].result for name in ("evaluate", "register", "score"))
    print(f"\n{table(evaluation)}\n")
    print(f"champion     {register['model']}, version {register['version']} of {config.workload}")
    print(f"predictions  {score['table']}")
    print(f"lake         {lake_root()}   receipts in runs/{config.workload}, tables in tables/{config.workload}")
    print(f"MLflow       make ui   (runs and models in {tracking.tracking_uri()})")
    print(f"took         {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    sys.exit(guarded(parser(__doc__).parse_args(), demo))
