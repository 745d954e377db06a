"""What Spark did, read from its event log."""

import json
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from pipelines.errors import LakeError
from pipelines.plans import last_query, plans_since
from pipelines.profile import as_text, latest_log, read_profile
from pipelines.session import size_shuffles, spark_progress


def test_a_session_leaves_a_log(spark: SparkSession, session_lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_LAKE", str(session_lake))
    before = last_query(spark)
    with spark_progress(spark, "count by number"):
        assert len(spark.range(1000).selectExpr("id % 7 as number").groupBy("number").count().collect()) == 7
    assert "HashAggregate" in plans_since(spark, before) and "==== count by number" in plans_since(spark, before)
    assert plans_since(spark, last_query(spark)) == ""
    profile = read_profile(latest_log("digits"))  # the session is still up
    assert profile.application == "headrace digits"
    ours = [stage for stage in profile.stages if stage.what == "count by number"]
    assert sum(stage.shuffle_write_bytes for stage in ours) > 0
    assert sum(stage.shuffle_read_bytes for stage in ours) == sum(stage.shuffle_write_bytes for stage in ours)
    assert spark.sparkContext.getLocalProperty("spark.job.description") is None


def test_shuffles_grow_with_what_is_read(spark: SparkSession) -> None:
    before = str(spark.conf.get("spark.sql.shuffle.partitions"))
    try:
        size_shuffles(spark, 1000)
        assert spark.conf.get("spark.sql.shuffle.partitions") == before, "never fewer"
        size_shuffles(spark, 10 << 30)
        assert spark.conf.get("spark.sql.shuffle.partitions") == "320"
    finally:
        spark.conf.set("spark.sql.shuffle.partitions", before)


def task(seconds: float, *, gc_ms: int = 0, disk: int = 0, failed: bool = False) -> dict[str, Any]:
    return {
        "Event": "SparkListenerTaskEnd",
        "Stage ID": 4,
        "Stage Attempt ID": 0,
        "Task Info": {"Launch Time": 1000, "Finish Time": 1000 + int(seconds * 1000), "Failed": failed},
        "Task Metrics": {
            "JVM GC Time": gc_ms,
            "Memory Bytes Spilled": 4 * disk,
            "Disk Bytes Spilled": disk,
            "Input Metrics": {"Bytes Read": 500},
            "Shuffle Read Metrics": {"Remote Bytes Read": 3, "Local Bytes Read": 4},
            "Shuffle Write Metrics": {"Shuffle Bytes Written": 10},
        },
    }


def log_of(path: Path, *tasks: dict[str, Any]) -> Path:
    events: list[dict[str, Any]] = [
        {"Event": "SparkListenerApplicationStart", "App Name": "headrace x"},
        {"Event": "SparkListenerJobStart", "Stage IDs": [4], "Properties": {}},
        *tasks,
        {
            "Event": "SparkListenerStageCompleted",
            "Stage Info": {
                "Stage ID": 4,
                "Stage Attempt ID": 0,
                "Stage Name": "collect at /somewhere/pipelines/metrics.py:75",
                "Submission Time": 1000,
                "Completion Time": 9000,
            },
        },
    ]
    lines = [json.dumps(event, separators=(",", ":")) + "\n" for event in events]
    path.write_text("".join(lines) + '{"Event":"SparkListenerTaskEnd","Stage')  # killed while it wrote
    return path


def test_skew_spills_and_garbage_are_named(tmp_path: Path) -> None:
    tasks = [task(1), task(1), task(8, gc_ms=3000, disk=5_000_000), task(0.5, failed=True)]
    profile = read_profile(log_of(tmp_path / "log", *tasks))
    (stage,) = profile.stages
    assert (stage.tasks, stage.failed_tasks, stage.wall_s, stage.task_s) == (4, 1, 8.0, 10.5)
    assert (stage.input_bytes, stage.shuffle_read_bytes, stage.shuffle_write_bytes) == (2000, 28, 40)
    assert stage.spill_bytes == (20_000_000, 5_000_000) and stage.skew == pytest.approx(8.0)
    text = as_text(profile)
    assert "collect at pipelines/metrics.py:75" in text
    for part in ("8.0 times the median", "spilled 5.0 MB", "29% of its time", "1 tasks failed"):
        assert part in text


def test_even_stages_give_no_trouble(tmp_path: Path) -> None:
    (stage,) = read_profile(log_of(tmp_path / "log", task(1), task(1.2), task(0.9))).stages
    assert stage.troubles == []


def test_what_is_no_log_is_refused(tmp_path: Path, lake: Path) -> None:
    (tmp_path / "log").write_text("once upon a time\n")
    with pytest.raises(LakeError, match="plain JSON lines"):
        read_profile(tmp_path / "log")
    (tmp_path / "log").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LakeError, match="plain JSON lines"):
        read_profile(tmp_path / "log")
    with pytest.raises(LakeError, match="make features W=digits"):
        latest_log("digits")
