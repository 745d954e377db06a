"""Train the torch network on all ranks, straight from the pinned feature table.

spark-submit --properties-file conf/spark.conf jobs/train.py conf/digits.yaml
"""

import sys

from pipelines.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job(__doc__, ["train"]))
