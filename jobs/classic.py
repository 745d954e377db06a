"""Fit the MLlib estimators and log them in MLflow.

spark-submit --properties-file conf/spark.conf jobs/classic.py conf/digits.yaml
"""

import sys

from pipelines.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job(__doc__, ["classic"]))
