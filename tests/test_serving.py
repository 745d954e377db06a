"""A registered model takes raw rows, wherever MLflow loads it, and says of them what the score stage says."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.scoring_server import invocations
from pyspark.sql import SparkSession

from pipelines import tracking
from pipelines.config.learning import Model
from pipelines.errors import DataError
from pipelines.features.fitted import (
    Bundle,
    FittedCategory,
    FittedFeatures,
    FittedImage,
    FittedInput,
    FittedLabel,
    FittedNumber,
    FittedSparse,
    FittedVector,
)
from pipelines.features.raw_rows import to_table
from pipelines.lake import LabelSpec, table_path
from pipelines.models.build import Served, build_network
from pipelines.tracking import ModelRef
from pipelines.train.worker import example_inputs
from tests.stages import run

pytestmark = pytest.mark.usefixtures("forked_ranks")
COLUMNS = {"a": "double", "n": "int", "color": "string", "on": "boolean", "day": "date", "y": "int"}


def census(num: int) -> str:
    """CSV text of `COLUMNS` with holes; color and a decide y."""
    random = np.random.default_rng(3)
    lines = []
    for _ in range(num):
        a, color = round(random.normal(), 3), random.choice(["rot", "grün", "blau", "selten"], p=[0.4, 0.3, 0.28, 0.02])
        y = int(a + (color == "rot") + random.normal() * 0.3 > 0.5)
        day = f"20{random.integers(10, 25)}-0{random.integers(1, 10)}-1{random.integers(0, 10)}"
        fields = [a, random.integers(0, 90), color, random.choice(["true", "false"]), day]
        lines.append(",".join(["" if random.random() < 0.1 else str(field) for field in fields] + [str(y)]))
    return "\n".join(lines) + "\n"


def test_the_champion_scores_raw_rows_as_the_score_stage_does(
    spark: SparkSession, lake: Path, workload: Callable[..., Path]
) -> None:
    path = workload(
        census(240),
        source={
            "format": "csv",
            "paths": str(lake.parent / "raw" / "*.csv"),
            "schema": ", ".join(f"{name} {dtype}" for name, dtype in COLUMNS.items()),
        },
        features={
            "label": {"column": "y", "kind": "binary", "positive": [1], "negative": [0]},
            "inputs": {
                "dense": {"columns": ["a", "n"], "steps": ["impute_mean", "standardize"]},
                "when": {"columns": ["day"], "steps": [{"date": {"parts": ["month"], "cyclic": True}}]},
                "bins": {"columns": ["n"], "steps": [{"bucketize": {"quantiles": 4}}]},
                "ids": {"columns": ["color", "on"], "steps": [{"vocabulary": {"min_count": 8}}]},
            },
        },
        classic=[{"estimator": "LogisticRegression", "maxIter": 5}],
        split={"hash": {"shares": {"train": 0.6, "test": 0.4}}, "validation": {"share": 0.2}},
        model={"network": "mlp", "hidden": [4]},
        train={"ranks": 1, "batch_size": 16, "epochs": 5, "lr": 0.03, "launcher": "torchrun"},
    )
    receipts = run(path, "ingest", "features", "classic", "train")
    rows = spark.read.format("delta").load(str(table_path("tiny", "raw"))).toPandas()
    for found in (receipts["classic"].result["models"][0], receipts["train"].result["model"]):
        ref = ModelRef.model_validate(found)
        stage = receipts["train" if ref.kind == "torch" else "classic"]
        tracking.register("tiny", ref, stage.run_id, alias="champion", evaluation="", tags={}, note="")
        run(path, "score")
        scored = spark.read.format("delta").load(str(table_path("tiny", "predictions"))).toPandas()
        wanted = rows[["row_id"]].merge(scored, on="row_id")
        champion = mlflow.pyfunc.load_model("models:/tiny@champion")
        as_json = json.loads(rows[list(COLUMNS)].drop(columns="y").to_json(orient="records", date_format="iso"))
        for given in (rows, as_json):
            assert_same(champion.predict(given), wanted)
        with pytest.raises(DataError, match="wanted a column 'color' of type string, seen a, n, day, on; give null"):
            champion.predict(rows.drop(columns="color"))
        with pytest.raises(DataError, match="column 'n': wanted int, seen Float value 1.5"):
            champion.predict(rows.assign(n=1.5))


def assert_same(seen: pd.DataFrame, wanted: pd.DataFrame) -> None:
    assert list(seen.columns) == ["prediction", "probability", "score", "probabilities"] and len(seen) == 240
    assert list(seen.prediction) == list(wanted.prediction) and set(seen.prediction) == {"0", "1"}, "both classes"
    for column in ("probability", "score", "probabilities"):
        np.testing.assert_allclose(np.stack(seen[column]), np.stack(wanted[column]), atol=1e-6)


INPUTS = (
    FittedInput(
        name="numbers",
        kind="dense",
        columns=(FittedNumber.model_validate({"column": "n", "steps": [{"step": "fill", "value": 2}]}),),
    ),
    FittedInput(name="words", kind="ids", columns=(FittedCategory(column="word", values=("x", "y")),)),
    FittedInput(name="picture", kind="image", whole=FittedImage(source="picture", shape=(2, 2))),
    FittedInput(name="list", kind="dense", whole=FittedVector(source="list", width=3)),
    FittedInput(name="bag", kind="sparse", whole=FittedSparse(source="bag", size=9)),
)
TYPES = {"n": "bigint", "word": "string", "picture": "binary", "list": "array<double>", "bag": "sparse(9)"}
ROWS: list[dict[str, Any]] = [
    {
        "n": 3,
        "word": "y",
        "picture": b"\x00\x01\x02\xff",
        "list": [1, 2.5, 3],
        "bag": {"ids": [0, 8], "values": [1, 2]},
    },
    {"n": None, "word": "new", "picture": bytes(4), "list": [0, 0, 0], "bag": {"ids": [4], "values": [1.5]}},
]


@pytest.fixture
def network(lake: Path) -> tuple[str, Served]:
    """The URI of a logged network that takes each kind of input, and the network."""
    label = LabelSpec(kind="multiclass", column="y", classes=("cat", "dog", "emu"))
    fitted = FittedFeatures(inputs=INPUTS, label=FittedLabel(spec=label), columns=TYPES)
    contract = fitted.contract(sparse_widths={"bag": 2})
    torch.manual_seed(1)
    served = Served(build_network(Model(network="mlp", hidden=[5]), contract), contract).eval()
    with tracking.start_run("zoo", "train", parent=None) as active:
        pass
    bundle = Bundle(name="mlp", kind="torch", fitted=fitted, contract=contract)
    uri, size = tracking.log_torch(served, "mlp", active.id, examples=example_inputs(contract), bundle=bundle)
    assert 1_000 < size < 60_000, "the package's source is no part of a model's size"
    return uri, served


def test_a_network_takes_every_kind_of_input(network: tuple[str, Served], tmp_path: Path) -> None:
    uri, served = network
    tensors = [
        torch.tensor([[3.0], [2.0]]),
        torch.tensor([[2], [0]]),
        torch.tensor([[[0, 1], [2, 255]], [[0, 0], [0, 0]]], dtype=torch.uint8),
        torch.tensor([[1, 2.5, 3], [0, 0, 0]]),
        torch.tensor([[0, 8], [4, 0]]),
        torch.tensor([[1.0, 2.0], [1.5, 0.0]]),
    ]
    wanted = served(*tensors).detach().numpy()
    model = mlflow.pyfunc.load_model(uri)
    seen = model.predict(ROWS)
    assert list(seen.columns) == ["prediction", "probability", "probabilities"]
    np.testing.assert_allclose(np.stack(seen.probabilities), wanted, atol=1e-6)
    assert list(seen.prediction) == [("cat", "dog", "emu")[place] for place in wanted.argmax(axis=1)]
    assert len(model.predict(model.input_example)) == 1
    assert Bundle.load(tracking.download(uri, tmp_path)).fitted.columns == TYPES == model.metadata.metadata["columns"]


def test_over_http(network: tuple[str, Served]) -> None:
    model = mlflow.pyfunc.load_model(network[0])

    def post(rows: list[dict[str, Any]]) -> Any:
        body = json.dumps({"dataframe_records": rows}, default=lambda value: base64.b64encode(value).decode())
        return invocations(body, "application/json", model, model.metadata.get_input_schema())

    response = post(ROWS)
    answer = json.loads(response.response)["predictions"]
    assert response.status == 200 and answer[0].keys() == {"prediction", "probability", "probabilities"}
    assert [row["prediction"] for row in answer] == list(model.predict(ROWS).prediction)
    with pytest.raises(MlflowException, match="column 'picture': wanted binary, seen Only base64 data") as refused:
        post([ROWS[0] | {"picture": "%"}])
    assert refused.value.get_http_status_code() == 400


ALONE = """
import sys
sys.modules |= dict.fromkeys(["pyspark", "delta", "petastorm"])  # importing one of them fails
import mlflow
uri, rows = sys.argv[1], eval(sys.argv[2])
print(list(mlflow.pyfunc.load_model(uri).predict(rows).prediction))
import pipelines
print(pipelines.__file__)
"""


def test_a_network_brings_all_that_it_needs(network: tuple[str, Served], lake: Path, tmp_path: Path) -> None:
    """Elsewhere: no Spark, no Petastorm, no Headrace, no pickle."""
    environment = {"MLFLOW_TRACKING_URI": tracking.tracking_uri(), "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HEADRACE_LAKE")}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, network[0], repr(ROWS)],
        cwd=tmp_path,
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    predictions, source = done.stdout.splitlines()[-2:]
    assert predictions == str(list(mlflow.pyfunc.load_model(network[0]).predict(ROWS).prediction))
    assert "/code/pipelines/" in source and str(lake) in source


@pytest.mark.parametrize(
    ("dtype", "value", "seen"),
    [
        ("int", "39", "Could not convert '39' with type str"),
        ("int", 2**40, "not in range"),
        ("double", "much", "Could not convert 'much'"),
        ("string", 5, "Expected a string or bytes dtype, got int64"),
        ("boolean", "yes", "Could not convert 'yes'"),
        ("date", "31.1.2024", "Failed to parse string: '31.1.2024'"),
        ("date", 5, "int64"),
        ("timestamp", "2024-01-31T10:00:00+02:00", "expected no zone offset"),
        ("binary", 5, "a value of type int"),
        ("binary", "ä", "ASCII"),
        ("array<float>", [1, "x"], "Could not convert 'x'"),
        ("sparse(3)", {"ids": [3], "values": [1.0]}, "ids from 3 to 3"),
        ("sparse(3)", {"ids": [None], "values": [1.0]}, "ids from None to None"),
        ("sparse(3)", {"ids": [1, 2], "values": [1.0]}, "a vector without as many values as ids"),
    ],
)
def test_values_that_do_not_fit(dtype: str, value: object, seen: str) -> None:
    with pytest.raises(DataError) as error:
        to_table(pd.DataFrame({"x": [value]}), {"x": dtype})
    assert str(error.value).startswith(f"column 'x': wanted {dtype}, seen ") and seen in str(error.value)


def test_values_as_pandas_and_json_hold_them() -> None:
    columns = {"i": "int", "b": "boolean", "d": "date", "t": "timestamp", "x": "float"}
    rows = pd.DataFrame(
        {
            "i": [1.0, np.nan],  # as pandas makes whole numbers beside a missing one
            "b": [True, None],
            "d": ["2024-02-29", None],
            "t": ["2024-02-29T10:00:00.5Z", None],
            "x": [1, None],
            "other": [object(), object()],
        }
    )
    table = to_table(rows, columns)
    first = table.slice(0, 1).to_pylist()[0]
    assert first["i"] == 1 and first["b"] is True and first["x"] == 1.0
    assert first["d"].isoformat() == "2024-02-29" and first["t"].isoformat() == "2024-02-29T10:00:00.500000+00:00"
    assert table.slice(1).to_pylist() == [dict.fromkeys(columns)]
    assert to_table(rows[:0], columns).num_rows == 0
