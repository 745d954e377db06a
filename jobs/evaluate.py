"""Score all candidates on the same rows and let the gate judge the best one.

spark-submit --properties-file conf/spark.conf jobs/evaluate.py conf/digits.yaml
"""

import sys

from pipelines.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job(__doc__, ["evaluate"]))
