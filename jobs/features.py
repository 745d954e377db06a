"""Fit the transform on the training split and write the feature tables, one a split.

spark-submit --properties-file conf/spark.conf jobs/features.py conf/digits.yaml
"""

import sys

from pipelines.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job(__doc__, ["features"]))
