"""A source that grew is read where it grew, and the result is that of reading all of it."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import write_deltalake
from pyspark.sql import SparkSession

from pipelines.errors import DataError
from pipelines.growth import read_record
from pipelines.lake import Snapshot, table_path
from pipelines.receipt import Receipt
from pipelines.tables import current_version
from tests.conftest import ROOT
from tests.stages import run

Workload = Callable[..., Path]
Capture = pytest.CaptureFixture[str]
REJECTING = ("source.max_rejected=0.5",)
OLD, NEW = "1,2,red,0\nx,4,blue,1\n\n5,6,red,1\n", "7,8,green,0\n9,10,red\n11,12,blue,1\n"


def ingest(path: Path, *overrides: str) -> Receipt:
    return run(path, "ingest", overrides=(*REJECTING, *overrides))["ingest"]


def contents(spark: SparkSession) -> dict[str, Any]:
    """Every row of the table and of its rejects, and what the record says of them."""
    table, rejects = table_path("tiny", "raw"), table_path("tiny", "raw_rejects")
    rows = spark.read.format("delta").load(str(table)).orderBy("_file", "_line").collect()
    rejected = spark.read.format("delta").load(str(rejects)).orderBy("_file", "_line").collect()
    record = read_record(table)
    assert record is not None
    summed = Snapshot.open(table)  # adds up row_id anew
    assert (record.rows, record.row_id_sum) == (summed.rows, summed.row_id_sum)
    card = [(c.name, c.present, c.distinct, c.min, c.max, round(c.mean or 0, 9), c.top) for c in record.card.columns]
    counts = (record.rows_read, record.rows_rejected, record.files)
    return {"rows": rows, "rejects": rejected, "counts": counts, "card": card}


def test_a_grown_source_is_as_one_read_whole(
    spark: SparkSession, lake: Path, workload: Workload, tmp_path: Path, capsys: Capture
) -> None:
    path = workload(OLD)
    first = ingest(path)
    (tmp_path / "raw" / "more.csv").write_text(NEW)
    grown = ingest(path)
    said = capsys.readouterr().out
    assert "reads the new files (1 of 2): nothing else changed" in said
    assert "3 rows read, 2 accepted, 1 rejected; the table holds 4" in said
    before = {file["path"] for file in first.result["snapshot"]["files"]}
    assert before < {file["path"] for file in grown.result["snapshot"]["files"]}, "what was there stays as it is"
    assert grown.result["rows_read"] == 6 and grown.result["rows_rejected"] == 2
    seen = contents(spark)
    assert [row["_line"] for row in seen["rows"]] == [1, 3, 1, 4], "a blank line counts"

    os.utime(tmp_path / "raw" / "more.csv")  # the time of a small file says nothing
    assert ingest(path) == grown
    record = next((lake / "tables" / "tiny" / "raw_record").glob("*.json"))
    record.unlink()
    (lake / "runs" / "tiny" / "ingest.json").unlink()
    whole = ingest(path)
    assert "reads every file (2): no record of what the table holds" in capsys.readouterr().out
    assert contents(spark) == seen
    assert whole.result["snapshot"]["row_id_sum"] == grown.result["snapshot"]["row_id_sum"]


def test_what_else_changed_is_named_and_all_is_read(
    spark: SparkSession, lake: Path, workload: Workload, tmp_path: Path, capsys: Capture
) -> None:
    path = workload(OLD)
    (tmp_path / "raw" / "more.csv").write_text(NEW)
    ingest(path)
    assert "reads every file (2): there is no version before" in capsys.readouterr().out
    (tmp_path / "raw" / "rows.csv").write_text(OLD.replace("5,6", "50,6"))
    ingest(path)
    assert "reads every file (2): rows.csv changed" in capsys.readouterr().out
    (tmp_path / "raw" / "more.csv").unlink()
    ingest(path)
    assert "reads every file (1): more.csv is gone" in capsys.readouterr().out
    ingest(path, "source.schema=a float, b double, colour string, y int", "features.inputs.ids.columns=[colour]")
    said = capsys.readouterr().out
    assert "reads every file (1): config source changed" in said
    assert "schema since the version before: 'color' renamed to 'colour', 'a' double became float" in said
    assert len(contents(spark)["rows"]) == 2


def test_a_refused_growth_leaves_the_version_and_is_taken_when_mended(
    spark: SparkSession, lake: Path, workload: Workload, tmp_path: Path
) -> None:
    path = workload("1,2,red,0\n3,4,blue,1\n")
    before = run(path, "ingest")["ingest"]
    more = tmp_path / "raw" / "more.csv"
    more.write_text("7,8,green,0\n9,10,red\n")
    with pytest.raises(DataError, match=r"1 of 4 rows do not fit .* rejected more\.csv line 2"):
        run(path, "ingest")
    assert current_version(table_path("tiny", "raw")) == before.result["snapshot"]["version"]
    rejects = spark.read.format("delta").load(before.result["rejects"])
    assert [row["_raw"] for row in rejects.collect()] == ["9,10,red"]
    more.write_text("7,8,green,0\n9,10,red,1\n")
    run(path, "ingest")
    seen = contents(spark)
    assert len(seen["rows"]) == 4 and not seen["rejects"]


def test_a_delta_source_that_grew(
    spark: SparkSession, lake: Path, workload: Workload, tmp_path: Path, capsys: Capture
) -> None:
    def write(values: list[float], mode: str) -> None:
        write_deltalake(str(tmp_path / "events"), pa.table({"a": values, "y": [1] * len(values)}), mode=mode)

    source = {"format": "delta", "paths": str(tmp_path / "events"), "schema": "a double, y bigint", "key": ["a"]}
    features = {"label": {"column": "a", "kind": "real"}, "inputs": {"x": {"columns": ["y"], "steps": ["standardize"]}}}
    path = workload(source=source, features=features, classic=[{"estimator": "LinearRegression"}])
    write([1.0, 2.0], "append")
    run(path, "ingest")
    write([3.0], "append")
    assert run(path, "ingest")["ingest"].rows == 3
    assert "reads the new files (1 of 2)" in capsys.readouterr().out
    write([4.0], "overwrite")
    assert run(path, "ingest")["ingest"].rows == 1
    assert "reads every file (1): " in capsys.readouterr().out


KILLED = """
import os, signal, sys
from deltalake import DeltaTable
from pipelines import ingest
from pipelines.cli import run_job

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def die_at_the_rows(table, *given, **options):
    die() if table.table_uri.rstrip("/").endswith("/raw") else commit(table, *given, **options)

commit, where = DeltaTable.create_write_transaction, sys.argv.pop(1)
if where == "read":
    ingest.make_card = die
elif where == "moved":
    DeltaTable.create_write_transaction = die_at_the_rows
elif where == "committed":
    ingest.pinned = die
sys.exit(run_job("", ["ingest"]))
"""


@pytest.mark.parametrize(
    ("where", "then"),
    [
        ("read", "reads the new files (1 of 2)"),  # the rows lie in the scratch folder, the rejects are committed
        ("moved", "reads the new files (1 of 2)"),  # the rows lie in the table's folder, and no commit names them
        ("committed", "reads the new files (0 of 2)"),  # and nobody was told
    ],
)
def test_killed_between_reading_and_writing(
    spark: SparkSession, lake: Path, workload: Workload, tmp_path: Path, capsys: Capture, where: str, then: str
) -> None:
    path = workload(OLD)
    ingest(path)
    (tmp_path / "raw" / "more.csv").write_text(NEW)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), where, str(path), "--set", *REJECTING]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYSPARK", "MLFLOW"))}
    with (tmp_path / "killed.log").open("w") as log:  # a pipe would be held open by the JVM, which ends a little later
        done = subprocess.run(
            command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, stdout=log, stderr=log, timeout=500
        )
    assert done.returncode == -signal.SIGKILL, (tmp_path / "killed.log").read_text()
    capsys.readouterr()
    receipt = ingest(path)
    assert then in capsys.readouterr().out
    seen = contents(spark)
    assert [(r["_file"], r["_line"], r["a"]) for r in seen["rows"]] == [
        ("more.csv", 1, 7.0),
        ("more.csv", 3, 11.0),
        ("rows.csv", 1, 1.0),
        ("rows.csv", 4, 5.0),
    ]
    assert [(r["_file"], r["_line"]) for r in seen["rejects"]] == [("more.csv", 2), ("rows.csv", 2)]
    assert (receipt.result["rows_read"], receipt.result["rows_rejected"]) == (6, 2)
