"""One contract for every file of conf/: it loads, it is told what it is for, and its whole chain runs."""

import re
from pathlib import Path

import pytest
import yaml
from pyspark.sql import SparkSession

from pipelines.config import load_config
from pipelines.config.load import _variables
from pipelines.run import declared
from tests.conftest import ROOT
from tests.small_data import copy_small
from tests.stages import features_of, run

pytestmark = pytest.mark.usefixtures("forked_ranks")
WORKLOADS = sorted((ROOT / "conf").glob("*.yaml"))
BUNDLED = ("ctr", "digits", "libsvm", "ratings")  # their data is made, or comes with an installed package
SMALL = {
    "ctr": ("source.prepare.rows=1000", "features.inputs.ids.steps=[{vocabulary: {max_size: 20}}]"),
    "ratings": ("source.prepare.rows=1000",),
}
QUICK = ("train.epochs=1", "gate.require={}", "train.early_stopping=null", "train.launcher=torchrun")


@pytest.fixture(scope="session")
def small_data(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_small(data, tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("path", WORKLOADS, ids=lambda path: path.stem)
def test_a_file_is_whole_and_says_what_it_is_for(path: Path) -> None:
    config = load_config(path)
    text = path.read_text()
    assert config.workload == path.stem
    assert text.startswith(f"# conf/{path.name}: ")
    assert not re.search(r"[ \"'](/|~)", text), "no path of a machine"
    assert config.gate.require, "an armed gate"
    used = set(re.findall(r"\$\{(\w+)", text))
    assert used <= {"HEADRACE_DATA", "HEADRACE_LAKE", "SPARK_HOME"} <= _variables().keys()
    assert yaml.safe_load(text)["workload"] == path.stem


@pytest.mark.parametrize("path", WORKLOADS, ids=lambda path: path.stem)
def test_its_whole_chain_runs(
    path: Path,
    spark: SparkSession,
    lake: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if path.stem not in BUNDLED:
        monkeypatch.setenv("HEADRACE_DATA", str(request.getfixturevalue("small_data")))
    short = {"maxIter": 3, "numTrees": 5, "maxDepth": 2}
    classic = [
        f"classic.{i}.{key}={value}"
        for i, estimator in enumerate(load_config(path).classic)
        for key, value in short.items()
        if key in estimator.params
    ]
    ranks = [] if path.stem in BUNDLED or load_config(path).model is None else ["train.ranks=1"]
    receipts = run(path, overrides=(*QUICK, *SMALL.get(path.stem, ()), *classic, *ranks))
    config = load_config(path)
    assert list(receipts) == declared(config)
    rows = receipts["ingest"].rows
    assert receipts["features"].rows == rows == receipts["score"].rows
    for split in config.split.names:
        snapshot, table = features_of(spark, receipts, split)
        assert table.count() == snapshot.rows
    if "train" in receipts:
        (epoch,) = receipts["train"].result["epochs"]
        train = receipts["features"].result["snapshots"]["train"]
        assert (epoch["rows"], epoch["row_id_sum"]) == (train["rows"], train["row_id_sum"])
    names = [c["name"] for c in receipts["evaluate"].result["candidates"]]
    assert len(names) == config.candidates and receipts["evaluate"].result["champion"] in names
    assert receipts["register"].result["version"] == 1
