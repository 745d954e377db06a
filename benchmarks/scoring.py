"""Scoring 1 M rows of 16 floats with a small mlp, against MLflow's own spark_udf on the same model and rows.

    python -m benchmarks.scoring

Both write to Spark's `noop` sink, in turn, in one session; the first round of each starts the Python workers and is
left out. Headrace's rows carry prediction, score and probabilities, spark_udf's the probabilities.
"""

import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.report import Figure, at_least, report, use_lake

if TYPE_CHECKING:
    from pipelines.tracking import ModelRef

ROWS, WIDTH, ROUNDS = 1_000_000, 16, 5
BOUND = 1.3


def log_network() -> tuple["ModelRef", str]:
    """A small mlp with random weights, logged as training logs one; and the URI of it as MLflow alone logs one."""
    import mlflow
    import numpy as np
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    from pipelines import tracking
    from pipelines.config.learning import Model
    from pipelines.features.fitted import Bundle, FittedFeatures, FittedInput, FittedLabel, FittedVector
    from pipelines.lake import LabelSpec
    from pipelines.models.build import Served, build_network
    from pipelines.tracking import ModelRef
    from pipelines.train.worker import example_inputs

    spec = LabelSpec(kind="multiclass", column="y", classes=("a", "b", "c", "d"))
    fitted = FittedFeatures(
        inputs=(FittedInput(name="x", kind="dense", whole=FittedVector(source="x", width=WIDTH)),),
        label=FittedLabel(spec=spec),
        columns={"x": "array<float>"},
    )
    contract = fitted.contract(sparse_widths={})
    torch.manual_seed(0)
    network = Served(build_network(Model.model_validate({"network": "mlp", "hidden": [64]}), contract), contract).eval()
    tracking.create_store()
    bundle = Bundle(name="mlp", kind="torch", fitted=fitted, contract=contract)
    with tracking.start_run("scoring", "scoring", parent=None) as run:
        run_id = run.id
    uri, size = tracking.log_torch(network, "mlp", run_id, examples=example_inputs(contract), bundle=bundle)
    with mlflow.start_run(run_id=run_id):
        plain = mlflow.pytorch.log_model(
            network,
            name="plain",
            signature=ModelSignature(inputs=Schema([TensorSpec(np.dtype("float32"), (-1, WIDTH))])),
            input_example=np.zeros((2, WIDTH), np.float32),
            serialization_format="pt2",
            pip_requirements=["torch"],
        )
    return ModelRef(name="mlp", kind="torch", uri=uri, size_bytes=size, snapshot="", features=""), plain.model_uri


def main() -> int:
    """Returns the exit code."""
    lake = use_lake("scoring")
    import mlflow.pyfunc
    from pyspark.sql import DataFrame
    from pyspark.sql import functions as F

    from pipelines.config import load_config
    from pipelines.features.apply import transform
    from pipelines.predict import loaded, predict
    from pipelines.session import get_session, stop_session

    ref, plain = log_network()
    spark = get_session(load_config("conf/digits.yaml"))
    path = str(lake / f"rows-{ROWS}")
    if not (lake / f"rows-{ROWS}" / "_SUCCESS").exists():
        values = F.array(*[F.randn(seed=i).cast("float") for i in range(WIDTH)])
        generated = spark.range(0, ROWS, numPartitions=8).select(F.col("id").alias("row_id"), values.alias("x"))
        generated.write.mode("overwrite").parquet(path)
    rows = spark.read.parquet(path)
    udf = mlflow.pyfunc.spark_udf(spark, plain, result_type="array<double>", env_manager="local")

    def seconds(frame: DataFrame) -> float:
        started = time.perf_counter()
        frame.write.format("noop").mode("overwrite").save()
        return time.perf_counter() - started

    ours, theirs = [], []
    with loaded(ref, lake) as model:

        def predicted() -> DataFrame:
            return predict(transform(rows, model.bundle.fitted, keep=["row_id"]), model, keep=["row_id"])

        for _ in range(ROUNDS + 1):
            ours.append(seconds(predicted()))
            theirs.append(seconds(rows.select("row_id", udf(F.col("x")).alias("probabilities"))))
        check = predicted().join(rows.select("row_id", udf(F.col("x")).alias("theirs")), on="row_id", how="inner")
        far = F.exists(F.zip_with("probabilities", "theirs", lambda a, b: F.abs(a - b)), lambda d: d > 1e-6)
        different = check.where(far | F.col("theirs").isNull()).count()
    stop_session()
    rate_ours, rate_theirs = ROWS / statistics.median(ours[1:]), ROWS / statistics.median(theirs[1:])
    return report(
        "scoring",
        [
            Figure("scoring.headrace", rate_ours, "rows/s"),
            Figure("scoring.mlflow_spark_udf", rate_theirs, "rows/s"),
            at_least("scoring.ratio", rate_ours / rate_theirs, "x", BOUND),
            Figure("scoring.rows_that_differ", different, "rows", goal="<= 0", met=different == 0),
        ],
    )


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[1])
    sys.exit(main())
