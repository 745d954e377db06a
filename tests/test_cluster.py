"""The chain on a real standalone cluster: Master and two Workers, authenticated and encrypted."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from pipelines.train.launch import WORKER
from tests.cluster import Submit, standalone_cluster, submitter
from tests.conftest import ROOT
from tests.train.conftest import children_that, killed_at


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Properties of jobs on the cluster, whose driver takes answers of 4 MB and no more."""
    with standalone_cluster(tmp_path_factory.mktemp("cluster"), ROOT / "conf" / "spark.conf") as conf:
        with conf.open("a") as file:
            file.write("spark.driver.maxResultSize 4m\n")
        yield conf


@pytest.fixture
def submit(cluster: Path, tmp_path: Path, session_lake: Path) -> Submit:
    """Run a workload on the cluster."""
    lake = tmp_path / "lake"
    lake.mkdir()
    (lake / "mlflow.db").write_bytes((session_lake / "mlflow.db").read_bytes())
    return submitter(cluster, lake)


@pytest.mark.cluster
def test_the_chain_on_a_standalone_cluster(submit: Submit, tmp_path: Path) -> None:
    dealt: dict[str, str | None] = {}  # by rank

    def rank() -> psutil.Process | None:
        found = children_that(lambda command: WORKER in command)
        for process in found:
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if "LOCAL_RANK" in environment:
                    dealt[environment["RANK"]] = environment.get("CUDA_VISIBLE_DEVICES")
        return found[0] if len(dealt) == 2 else None

    with killed_at(math.inf, rank):
        receipts = submit("run", "conf/digits.yaml", "train.epochs=2", "gate.require={}", "classic=[]")
    assert dealt.keys() == {"0", "1"} and set(dealt.values()) <= {"5", "7"}, "GPUs that Spark dealt to the ranks"
    train = receipts["features"]["result"]["snapshots"]["train"]
    for epoch in receipts["train"]["result"]["epochs"]:
        assert (epoch["rows"], epoch["row_id_sum"]) == (train["rows"], train["row_id_sum"])
    assert receipts["register"]["result"]["version"] == 1 and receipts["score"]["rows"] == 1797
    lake = tmp_path / "lake"
    (package,) = (lake / "code").glob("headrace-*.zip")
    log = next((lake / "runs" / "digits" / "train").glob("*/ranks.log")).read_text()
    assert "Traceback" not in log and package.is_file()
    again = submit("train", "conf/digits.yaml", "train.epochs=1", "classic=[]", "train.strategy=parameter_server")
    (epoch,) = again["train"]["result"]["epochs"]
    assert (epoch["rows"], epoch["row_id_sum"]) == (train["rows"], train["row_id_sum"])
    assert epoch["exchange"]["updates"] > 0, "a server and a worker, each on an executor of its own"


@pytest.mark.cluster
def test_a_vocabulary_that_the_driver_could_not_take(submit: Submit, tmp_path: Path, workload: Any) -> None:
    """120,000 values are more than half of 4 MB; the ids are ranks by count all the same."""
    users = [f"user-{i:012d}" for i in range(120_000)]
    seen = np.concatenate([np.repeat(users[:3], [5_000, 400, 30]), users])
    columns = {"a": np.arange(len(seen)), "user": seen, "y": np.arange(len(seen), dtype=np.int32) % 2}
    (tmp_path / "raw").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "raw" / "rows.parquet", row_group_size=20_000)
    path = workload(
        source={"format": "parquet", "paths": str(tmp_path / "raw"), "schema": "a bigint, user string, y int"},
        split={"hash": {"shares": {"train": 0.9, "test": 0.1}}},
        features={
            "label": {"column": "y", "kind": "binary", "positive": [1], "negative": [0]},
            "inputs": {"ids": {"columns": ["user"], "steps": ["vocabulary"]}},
        },
    )
    submit("ingest", path)
    result = submit("features", path)["features"]["result"]
    stored = result["fitted"]["inputs"][0]["columns"][0]["stored"]
    table = DeltaTable(stored["folder"]).to_pandas().sort_values("id")
    assert table["id"].tolist() == list(range(1, stored["size"] + 1)) and stored["size"] > 100_000
    assert table["value"].tolist()[:3] == users[:3] and (np.diff(table["value"][3:].rank()) > 0).all()
    files = [Path(snapshot["table"]) for snapshot in result["snapshots"].values()]
    ids = {i for file in files for row in DeltaTable(file).to_pandas()["ids"] for i in row}
    assert {0, *range(1, stored["size"] + 1)} == ids, "values of the test split alone are out of vocabulary"
