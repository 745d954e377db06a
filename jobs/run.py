"""Run every stage that the config declares; what is up to date is skipped.

spark-submit --properties-file conf/spark.conf jobs/run.py conf/digits.yaml
"""

import sys

from pipelines.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job(__doc__))
