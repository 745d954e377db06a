"""Values by the million, a value in half of all rows, and the transform without Spark: parts of benchmarks.features."""

import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmarks.apart import run
from benchmarks.report import Figure, at_least, at_most

ROUNDS = 3
DISTINCT = 5_000_000
ONE_CORE_ROWS = 200_000
SCHEMA = "id bigint, user string, y int"


def workload(lake: Path, name: str) -> Path:
    """A vocabulary of the column `user` of generated rows."""
    config = {
        "workload": name,
        "source": {"format": "parquet", "paths": str(lake / name / "*.parquet"), "schema": SCHEMA, "key": ["id"]},
        "split": {"hash": {"shares": {"train": 0.9, "test": 0.1}}},
        "features": {
            "label": {"column": "y", "kind": "binary", "positive": [1], "negative": [0]},
            "inputs": {"ids": {"columns": ["user"], "steps": ["vocabulary"]}},
        },
        "model": {"network": "mlp"},
        "lake": {"shared": True},
    }
    path = lake / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def generate(lake: Path, name: str, rows: int, user: str) -> None:
    """Rows whose `user` is that expression of `id`."""
    from pipelines.config import load_config
    from pipelines.session import get_session

    target = lake / name
    if not (target / "_SUCCESS").exists():
        found = get_session(load_config(workload(lake, name))).range(0, rows, numPartitions=8)
        label = "cast(pmod(xxhash64(id, 'y'), 2) as int) y"
        found.selectExpr("id", f"{user} user", label).write.mode("overwrite").parquet(str(target))


def measure_cluster(distinct: int) -> dict[str, Any]:
    """The features stage on a standalone cluster, its driver with 2 GB, of which answers may take 16 MB."""
    import tempfile

    from pipelines.config.load import lake_root
    from pipelines.lake import receipt_path
    from pipelines.receipt import read_receipt
    from pipelines.session import DEFAULT_PROPERTIES, stop_session
    from tests.cluster import standalone_cluster

    lake, name = lake_root(), f"users_{distinct}"
    path = workload(lake, name)
    generate(lake, name, distinct * 115 // 100, "hex(xxhash64(id))")  # a tenth of the rows is not for training
    stop_session()
    with tempfile.TemporaryDirectory() as folder, standalone_cluster(Path(folder), DEFAULT_PROPERTIES) as conf:
        with conf.open("a") as file:
            file.write("spark.driver.memory 2g\nspark.driver.maxResultSize 16m\n")
        submit = [str(Path(sys.executable).parent / "spark-submit"), "--properties-file", str(conf)]
        seconds = {}
        for stage in ("ingest", "features"):
            (lake / "runs" / name / f"{stage}.json").unlink(missing_ok=True)
            started = time.perf_counter()
            subprocess.run([*submit, f"jobs/{stage}.py", str(path)], check=True, stdout=sys.stderr)
            seconds[stage] = time.perf_counter() - started
    receipt = read_receipt(receipt_path(name, "features"))
    assert receipt, "the stage has run"
    stored = receipt.result["fitted"]["inputs"][0]["columns"][0]["stored"]
    return {"seconds": seconds["features"], "values": stored["size"]}


def measure_skew(rows: int) -> dict[str, list[float]]:
    """Seconds of the features stage where values are as frequent as each other, and where one is in half of the rows."""
    from pipelines.config import load_config
    from pipelines.config.load import lake_root
    from pipelines.lake import receipt_path
    from pipelines.run import run_stages

    users = {
        f"even_{rows}": f"hex(xxhash64(pmod(xxhash64(id), {rows})))",
        f"skewed_{rows}": f"if(id % 2 = 0, 'often', hex(xxhash64(pmod(xxhash64(id), {rows}))))",
    }
    seconds: dict[str, list[float]] = {name: [] for name in users}
    for name, user in users.items():
        generate(lake_root(), name, rows, user)
        run_stages(load_config(workload(lake_root(), name)), ["ingest"])
    for _ in range(ROUNDS + 1):  # the first warms up
        for name in users:
            receipt_path(name, "features").unlink(missing_ok=True)
            started = time.perf_counter()
            run_stages(load_config(workload(lake_root(), name)), ["features"])
            seconds[name].append(time.perf_counter() - started)
    return {"even": seconds[f"even_{rows}"][1:], "skewed": seconds[f"skewed_{rows}"][1:]}


def measure_arrow(rows: int) -> dict[str, Any]:
    """Rows a second of the fitted transform of conf/ctr.yaml, and milliseconds of one row, in this one thread."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipelines.features.apply_arrow import ArrowFeatures
    from pipelines.features.fitted import FittedFeatures
    from pipelines.lake import Snapshot, receipt_path
    from pipelines.receipt import read_receipt

    pa.set_cpu_count(1)
    receipts = {stage: read_receipt(receipt_path(f"ctr_{rows}", stage)) for stage in ("ingest", "features")}
    assert receipts["ingest"] and receipts["features"], "the stages have run"
    snapshot = Snapshot.model_validate(receipts["ingest"].result["snapshot"])
    table = pq.read_table(snapshot.paths()[0]).slice(0, ONE_CORE_ROWS).combine_chunks()
    features = ArrowFeatures(FittedFeatures.model_validate(receipts["features"].result["fitted"]))
    batches = table.to_batches(max_chunksize=10_000)
    speeds, times = [], []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        for batch in batches:
            features(batch)
        speeds.append(table.num_rows / (time.perf_counter() - started))
    for row in table.slice(0, 1000).to_pylist():
        started = time.perf_counter()
        features(pa.Table.from_pylist([row], schema=table.schema))
        times.append(1000 * (time.perf_counter() - started))
    return {"rows_per_s": speeds[1:], "row_ms": times, "rows": table.num_rows}


MEASURES = {"cluster": measure_cluster, "skew": measure_skew, "arrow": measure_arrow}


def vocabulary(rows: int) -> list[Figure]:
    """A vocabulary of two and a half times as many values as the other parts have rows, 5 M by default."""
    distinct = rows * 5 // 2
    found = run("benchmarks.features", "--measure", "cluster", distinct)
    return [
        Figure("vocabulary_5m_seconds", found["seconds"], "s"),
        at_least("vocabulary_5m", found["values"], "values", distinct),
    ]


def skew(rows: int) -> list[Figure]:
    """One value in half of all rows against values as frequent as each other."""
    found = {name: median(seconds) for name, seconds in run("benchmarks.features", "--measure", "skew", rows).items()}
    seconds = [Figure(f"skew_seconds_{name}", value, "s") for name, value in found.items()]
    return [*seconds, at_most("skew", found["skewed"] / found["even"], "x", 1.5)]


def arrow(rows: int) -> list[Figure]:
    """The transform that the part `speed` fitted, without Spark on one core; a row from a dict to arrays."""
    found = run("benchmarks.features", "--measure", "arrow", rows)
    return [
        at_least("arrow_rows_per_s", median(found["rows_per_s"]), "rows/s", 200_000),
        at_most("arrow_row_ms", median(found["row_ms"]), "ms", 2.0),
    ]


PARTS = {"vocabulary": vocabulary, "skew": skew, "arrow": arrow}
