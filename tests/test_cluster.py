"""The chain on a real standalone cluster: Master and two Workers, authenticated and encrypted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import standalone_cluster
from tests.conftest import ROOT

BIN = Path(sys.executable).parent


@pytest.mark.cluster
def test_the_chain_on_a_standalone_cluster(tmp_path: Path, session_lake: Path) -> None:
    lake = tmp_path / "lake"
    lake.mkdir()
    (lake / "mlflow.db").write_bytes((session_lake / "mlflow.db").read_bytes())
    names = {k: v for k, v in os.environ.items() if not k.startswith(("PYSPARK", "SPARK_CONF", "MLFLOW", "OMP"))}
    environment = {**names, "HEADRACE_LAKE": str(lake), "PATH": f"{BIN}:{os.environ['PATH']}"}
    overrides = ["lake.shared=true", "train.epochs=2", "gate.require={}", "classic=[]"]
    with standalone_cluster(tmp_path, ROOT / "conf" / "spark.conf") as conf:
        command = [str(BIN / "spark-submit"), "--properties-file", str(conf), "jobs/run.py", "conf/digits.yaml"]
        for override in overrides:
            command += ["--set", override]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    receipts = {path.stem: json.loads(path.read_text()) for path in (lake / "runs" / "digits").glob("*.json")}
    train = receipts["features"]["result"]["snapshots"]["train"]
    for epoch in receipts["train"]["result"]["epochs"]:
        assert (epoch["rows"], epoch["row_id_sum"]) == (train["rows"], train["row_id_sum"])
    assert receipts["register"]["result"]["version"] == 1 and receipts["score"]["rows"] == 1797
    (package,) = (lake / "code").glob("headrace-*.zip")
    log = next((lake / "runs" / "digits" / "train").glob("*/ranks.log")).read_text()
    assert "Traceback" not in log and package.is_file()
