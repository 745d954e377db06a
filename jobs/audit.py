"""Derive again what trained a run, or say which registered models saw a row.

spark-submit --properties-file conf/spark.conf jobs/audit.py conf/adult.yaml --run RUN_ID
spark-submit --properties-file conf/spark.conf jobs/audit.py conf/adult.yaml --row adult.data:17
"""

import sys

from pipelines.audit import as_text, audit_row, audit_run, text_of
from pipelines.cli import guarded, parser
from pipelines.config import Config
from pipelines.errors import ConfigError, TrainingError


def show(config: Config) -> None:
    """The run's table, files and rows; or the models and whether they saw the row."""
    if bool(arguments.run) == bool(arguments.row):
        raise ConfigError("audit: wanted one of --run and --row (make audit RUN=... or ROW=...)")
    if arguments.row:
        print(text_of(audit_row(config, arguments.row)))
        return
    audit = audit_run(arguments.run)
    print(as_text(audit))
    if audit.differences:
        raise TrainingError(f"run {audit.run_id}: not every row is accounted for")


if __name__ == "__main__":
    jobs = parser(__doc__)
    jobs.add_argument("--run", help="MLflow's id of the run")
    jobs.add_argument("--row", help="the row's key: source.key's values, or FILE:LINE, or row_id=NUMBER")
    arguments = jobs.parse_args()
    sys.exit(guarded(arguments, show))
