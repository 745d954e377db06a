"""Read raw files into a typed Delta table; rows that do not fit go to a reject table.

spark-submit --properties-file conf/spark.conf jobs/ingest.py conf/digits.yaml
"""

import sys

from pipelines.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job(__doc__, ["ingest"]))
