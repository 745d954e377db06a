"""Spark's Python daemon with a scoring worker's imports behind it: each worker that it forks is ready at once.

Spark ends workers that are idle for a minute, so that without it every chain of the tests pays for them anew.
"""

import gc
import sys

import mlflow.pytorch
import pandas
import torch._dynamo
import torch.export._trace
from pyspark.daemon import manager

import pipelines.predict

__all__ = ["mlflow", "pandas", "pipelines", "torch"]

if __name__ == "__main__":
    # In front of each task a worker reads the directory of every archive it imports from, once for each of the packages
    # inside (Python 3.11's zipimport), and behind it collects garbage, through all that these modules hold.
    sys.path = [entry for entry in sys.path if not entry.endswith((".jar", ".zip"))]
    sys.path_importer_cache.clear()
    gc.freeze()
    manager()
