"""The plan of a run is told before it, and each trap is refused with the command that mends it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import write_deltalake
from pyspark.ml.linalg import Vectors
from pyspark.sql import SparkSession

from pipelines.config import load_config
from pipelines.config.strategies import TensorParallel
from pipelines.dry_run import as_text, dry_run, pinned
from pipelines.errors import DataError, LakeError, Refused
from pipelines.features.layout import rewrite
from pipelines.lake import Snapshot, receipt_path, table_path
from pipelines.lake.traps import traps_of
from pipelines.receipt import Receipt, write_json
from pipelines.stream import EpochReceipt, LaneLoader
from pipelines.train.job import TrainJob
from tests.tables import DENSE, contract_of, feature_table
from tests.train.test_loop import job_of


@pytest.fixture
def config(lake: Path, workload: Callable[..., Path]) -> Any:
    """A workload whose features are made."""
    snapshot = feature_table(table_path("tiny", "features/train"), [70, 50, 30], contract_of(DENSE))
    job: TrainJob = job_of(lake / "job", snapshot)
    result = {"snapshots": {"train": snapshot.model_dump(mode="json")}, "fitted": job.fitted.model_dump(mode="json")}
    receipt = Receipt(stage="features", workload="tiny", digest="f", made_from={}, seconds=1, rows=150, result=result)
    write_json(receipt_path("tiny", "features"), receipt)
    section = {"ranks": 2, "lanes": 4, "batch_size": 16, "window": 1, "epochs": 3}
    return load_config(workload("", model={"network": "softmax"}, train=section, classic=[]))


def trained(config: Any, **result: Any) -> None:
    """Leave a receipt of training."""
    model = {"snapshot": pinned(config).digest}
    epochs = [{"rows_per_s": rate} for rate in (90.0, 150.0, 160.0)]
    values = {"model": model, "epochs": epochs, "base_mb": 400.0, "ranks": 3, "strategy": "gossip", **result}
    receipt = Receipt(stage="train", workload="tiny", digest="t", made_from={}, seconds=1, rows=150, result=values)
    write_json(receipt_path("tiny", "train"), receipt)


def test_a_plan_by_the_last_run(config: Any) -> None:
    trained(config)
    plan = dry_run(config, pinned(config))
    found = plan.forecast
    assert (found.rows, found.steps, found.lane_rows) == (150, 10, (37, 38)) and plan.row_groups == plan.files == 3
    assert [(list(rank.lanes), rank.rows) for rank in found.ranks] == [([0, 1], 75), ([2, 3], 75)]
    assert sum(rank.row_groups for rank in found.ranks) == 4, "one is on the boundary of the ranks"
    assert found.imbalance == 1.0 and plan.epoch_s == 1.0 and 400 < plan.memory_mb < 401 and not plan.refusals
    text = as_text(plan)
    assert (
        "1.0 s an epoch, 3.0 s for 3 (by the last run, gossip on 3 ranks: 150 rows/s)" in text
        and "retention  overwritten" in text
    )
    assert "ranks      2, data_parallel" in text
    assert json.loads(plan.model_dump_json())["forecast"]["steps"] == 10


def test_ranks_that_share_their_rows_are_told_as_a_group(config: Any) -> None:
    trained(config)
    cut = config.model_copy(update={"train": config.train.model_copy(update={"strategy": TensorParallel()})})
    text = as_text(dry_run(cut, pinned(config)))
    assert "ranks      2, tensor_parallel" in text
    assert "group lanes" in text and "    0 0 to 3" in text and "fullest group" in text


def test_a_plan_by_a_probe(config: Any) -> None:
    plan = dry_run(config, pinned(config))
    assert plan.rates.source.startswith("a probe of 3 s on one rank") and plan.rates.rows_per_s > 100
    assert 100 < plan.memory_mb < 3000


def test_too_little_memory_or_retention_is_refused_with_a_command(config: Any) -> None:
    trained(config, epochs=[{"rows_per_s": 1e-4}])
    small = config.model_copy(update={"train": config.train.model_copy(update={"memory_mb": 300})})
    memory, retention = dry_run(small, pinned(config)).refusals
    assert "a rank needs 400 MB, of 300 MB" in memory and 'make layout ARGS="' in memory
    assert "the table keeps overwritten files for 168 h" in retention and "ALTER TABLE delta.`" in retention


def test_a_table_that_is_no_longer_what_the_receipt_says(config: Any) -> None:
    table = Path(pinned(config).table)
    victim = sorted(table.glob("*.parquet"))[0]
    content = victim.read_bytes()
    victim.unlink()
    with pytest.raises(Refused, match=r"1 are gone .* make features W=tiny"):
        pinned(config)
    victim.write_bytes(content)
    (table / "_common_metadata").write_bytes(b"cposix\nsystem\n(S'touch canary'\ntR.")
    (table / "part-planted.parquet").write_bytes(content)
    with pytest.raises(Refused) as refused:
        dry_run(config, pinned(config))
    summary, stranger = str(refused.value).splitlines()
    assert "_common_metadata: Petastorm would unpickle" in summary and summary.endswith(f"rm {table}/_common_metadata")
    assert stranger.endswith(f"rm {table}/part-planted.parquet")
    receipt_path("tiny", "features").unlink()
    with pytest.raises(LakeError, match="run `make features W=tiny`"):
        pinned(config)


def test_files_of_older_versions_are_no_trap(config: Any) -> None:
    table = pinned(config).table
    write_deltalake(table, pa.table({"row_id": pa.array([1], pa.int64())}), mode="overwrite", schema_mode="overwrite")
    assert traps_of(Snapshot.open(table)) == []


TRAPS = {
    "null": (pa.table({"x": pa.array([1, None, 3])}), "column 'x': wanted no nulls, seen 1"),
    "boolean with null": (pa.table({"x": pa.array([True, None])}), "column 'x': wanted no nulls, seen 1"),
    "ragged": (pa.table({"x": [[1.0], [1.0, 2.0]]}), "column 'x': wanted values of one length, seen several lengths"),
    "nested": (pa.table({"x": [[[1.0]], [[2.0]]]}), "column 'x': wanted a list of numbers, seen list"),
    "struct": (pa.table({"x": [{"a": 1}]}), "column 'x': wanted a number, a boolean, a list of numbers or bytes"),
    "decimal": (pa.table({"x": pa.array([1], pa.decimal128(10, 2))}), "seen decimal128(10, 2)"),
    "timestamp": (pa.table({"x": pa.array([1], pa.timestamp("us", "UTC"))}), "seen timestamp"),
    "text": (pa.table({"x": ["a"]}), "seen string"),
}


@pytest.mark.parametrize("name", TRAPS)
def test_each_column_that_cannot_be_a_tensor_is_named(tmp_path: Path, name: str) -> None:
    table, wanted = TRAPS[name]
    write_deltalake(str(tmp_path / "t"), table)
    snapshot = Snapshot.open(tmp_path / "t")
    (trap,) = traps_of(snapshot)
    assert wanted in str(trap) and str(trap).endswith(f'make layout ARGS="{tmp_path}/t {tmp_path}/t_layout"')
    with pytest.raises(
        DataError, match="column 'x': wanted .* choose other columns, or rewrite the table: make layout"
    ):
        LaneLoader(snapshot, 4)


def test_an_evolved_schema_is_named(tmp_path: Path) -> None:
    write_deltalake(str(tmp_path / "t"), pa.table({"x": [1]}))
    write_deltalake(str(tmp_path / "t"), pa.table({"x": [2], "y": [3]}), mode="append", schema_mode="merge")
    (trap,) = traps_of(Snapshot.open(tmp_path / "t"))
    assert "column 'y': wanted it in all files, seen it in some of them only" in str(trap)


def test_layout_rewrites_what_streaming_refuses(spark: SparkSession, tmp_path: Path) -> None:
    source, target = str(tmp_path / "source"), tmp_path / "target"
    rows = spark.range(100).selectExpr(
        "int(id) as n",
        "if(id % 5 = 0, null, int(id)) as x",
        "slice(array(1f, 1f, 1f), 1, int(id % 3)) as r",
        "cast(id / 4 as decimal(10, 2)) as d",
        "timestamp_micros(id) as t",
        "string(id) as s",
        "id % 2 as part",
    )
    vectors = spark.createDataFrame([(i, Vectors.dense([i, 2.0 * i])) for i in range(100)], ["n", "v"])
    joined = rows.join(vectors.selectExpr("int(n) as n", "v"), on="n", how="inner").coalesce(1)
    joined.write.format("delta").partitionBy("part").option("delta.enableDeletionVectors", "true").save(source)
    spark.sql(f"DELETE FROM delta.`{source}` WHERE n = 7")
    with pytest.raises(
        LakeError, match=f"seen a user-defined type such as MLlib's vectors; .*make layout ARGS=\"{source} "
    ):
        Snapshot.open(source)
    columns = ["n", "x", "r", "d", "t", "v", "part"]
    with pytest.raises(DataError, match="column 's': wanted numbers.*--columns"):
        rewrite(spark, source, target)
    with pytest.raises(DataError, match="column 'x': wanted no nulls, seen 20; --fill x=0 fills them"):
        rewrite(spark, source, target, columns=columns)
    with pytest.raises(DataError, match="column 'r': wanted one length, seen 0 to 2; --pad r=2 fills them up"):
        rewrite(spark, source, target, columns=columns, fill={"x": -1})
    snapshot = rewrite(spark, source, target, columns=columns, fill={"x": -1}, pad={"r": 2}, shard_mb=0.002)
    assert traps_of(snapshot) == [] and snapshot.rows == 99 and len(snapshot.files) > 1
    receipt, seen = EpochReceipt(snapshot), {}
    with LaneLoader(snapshot, 10, epochs=1) as loader:
        for batch in loader:
            receipt.add(batch)
            for n, x, r, d, t, v in zip(*(batch.tensors[name].tolist() for name in columns[:-1]), strict=True):
                seen[n] = (x, r, d, t, v)
    receipt.check(epoch=0)
    wanted = {
        n: (-1 if n % 5 == 0 else n, [1.0] * min(n % 3, 2) + [0.0] * (2 - min(n % 3, 2)), n / 4, n, [n, 2.0 * n])
        for n in range(100)
        if n != 7
    }
    assert seen == wanted
