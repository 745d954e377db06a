"""Search better parameters for the candidates that the section `tune` names.

spark-submit --properties-file conf/spark.conf jobs/tune.py conf/digits.yaml
"""

import sys

from pipelines.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job(__doc__, ["tune"]))
