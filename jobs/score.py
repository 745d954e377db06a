"""Score rows with the champion into a Delta table of predictions.

spark-submit --properties-file conf/spark.conf jobs/score.py conf/digits.yaml
"""

import sys

from pipelines.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job(__doc__, ["score"]))
