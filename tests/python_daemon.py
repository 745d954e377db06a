"""Spark's Python daemon with a scoring worker's imports behind it: each worker that it forks is ready at once.

Spark ends workers that are idle for a minute, so that without it every chain of the tests pays for them anew.
"""

import mlflow.pytorch
import pandas
import torch._dynamo
import torch.export._trace
from pyspark.daemon import manager

import pipelines.score

__all__ = ["mlflow", "pandas", "pipelines", "torch"]

if __name__ == "__main__":
    manager()
