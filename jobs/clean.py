"""Remove a workload's tables, receipts, checkpoints, saved models and Spark's event logs. MLflow's runs and registered models stay.

python jobs/clean.py conf/digits.yaml --dry-run
"""

import shutil
import sys

from pipelines.cli import guarded, parser
from pipelines.config import Config
from pipelines.config.load import lake_root
from pipelines.run import only_one


def clean(config: Config) -> None:
    """Say each folder with its size, and remove it."""
    with only_one(config.workload):
        for part in ("tables", "runs", "models", "raw", "logs/spark"):
            folder = lake_root() / part / config.workload
            if not folder.is_dir():
                continue
            size_mb = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
            print(f"{'would remove' if arguments.dry_run else 'removes'} {folder} ({size_mb:,.1f} MB)")
            if not arguments.dry_run:
                shutil.rmtree(folder)
    print("kept: runs and registered models in MLflow")


if __name__ == "__main__":
    jobs = parser(__doc__)
    jobs.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    arguments = jobs.parse_args()
    sys.exit(guarded(arguments, clean))
