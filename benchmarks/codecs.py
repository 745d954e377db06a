"""What reading a feature table costs, by the codec of its files: the images of mnist_softmax, one thread.

python -m benchmarks.codecs
"""

import os
import statistics
import time
from pathlib import Path

from benchmarks.jobs import make_job
from benchmarks.report import FOLDER, Figure, report

CODECS = {"lz4_raw": "LZ4", "snappy": "SNAPPY", "zstd": "ZSTD", "uncompressed": "NONE"}  # Spark's name and pyarrow's
READS = 15


def main() -> int:
    """Returns the exit code."""
    import pyarrow.parquet as pq

    from pipelines.stream.memory import keep_freed_memory

    job = make_job("conf/mnist_softmax.yaml", ["train.ranks=1"], lake="epoch")
    tables = [pq.read_table(path) for path in job.snapshot.paths()]
    keep_freed_memory()
    seconds: dict[str, list[float]] = {codec: [] for codec in CODECS}
    paths = {codec: [FOLDER / "codecs" / f"{codec}-{i}.parquet" for i in range(len(tables))] for codec in CODECS}
    (FOLDER / "codecs").mkdir(parents=True, exist_ok=True)
    for codec, name in CODECS.items():
        for table, path in zip(tables, paths[codec], strict=True):
            pq.write_table(table, path, compression=name)
    for _ in range(READS):  # in turn, so that a slow moment of the machine meets all
        for codec in CODECS:
            started = time.perf_counter()
            for path in paths[codec]:
                pq.ParquetFile(path).read_row_group(0, use_threads=False)
            seconds[codec].append(time.perf_counter() - started)
    figures = []
    for codec in CODECS:
        size = sum(path.stat().st_size for path in paths[codec])
        figures.append(Figure(f"codec.{codec}.read", statistics.median(seconds[codec][1:]), "s"))
        figures.append(Figure(f"codec.{codec}.size", size / 1e6, "MB"))
    return report("codecs", figures)


if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[1])
    raise SystemExit(main())
