"""Find frequent patterns, near duplicates and communities, each into a Delta table.

spark-submit --properties-file conf/spark.conf jobs/mine.py conf/baskets.yaml
"""

import sys

from pipelines.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job(__doc__, ["mine"]))
