"""Register the candidate that the gate passed, as champion.

spark-submit --properties-file conf/spark.conf jobs/register.py conf/digits.yaml
"""

import sys

from pipelines.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job(__doc__, ["register"]))
