"""One loader reads one table, an epoch at a time; a process of its own:

    python -m benchmarks.readers LOADER TABLE EPOCHS

Prints the rows per second of each epoch, as JSON. All give batches of 1,024 rows as torch tensors but pyarrow, which
reads the files alone, on one thread: the limit.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

BATCH, LANES = 1024, 2
ROWS_OF_SLOW, ROWS_OF_SLOWEST = 200_000, 20_000  # of a loader that is many times slower only so many are read


def files_of(table: Path) -> list[Path]:
    """The table's Parquet files."""
    return sorted(table.glob("*.parquet"))


def headrace(table: Path, epochs: int, *, shuffle: bool = True) -> Iterator[Iterator[int]]:
    """Exact, shuffled; the order of the whole epoch is new each time."""
    from pipelines.stream import EpochReceipt, LaneLoader, Snapshot

    snapshot = Snapshot.open(table)
    with LaneLoader(snapshot, BATCH, lanes=LANES, shuffle=shuffle) as loader:  # the last reads ahead as any does

        def epoch(number: int) -> Iterator[int]:
            receipt = EpochReceipt(snapshot)
            for batch in loader:
                receipt.add(batch)
                yield batch.rows
            receipt.check(epoch=number)

        yield from map(epoch, range(epochs))


def headrace_in_order(table: Path, epochs: int) -> Iterator[Iterator[int]]:
    """Without shuffling."""
    return headrace(table, epochs, shuffle=False)


def petastorm_batched(table: Path) -> Iterator[int]:
    """Petastorm's BatchedDataLoader, shuffled by a buffer; on the first rows only."""
    from petastorm import make_batch_reader
    from petastorm.pytorch import BatchedDataLoader

    with make_batch_reader(_urls(table), num_epochs=1, workers_count=2, shuffle_row_groups=True) as reader:
        loader = BatchedDataLoader(reader, batch_size=BATCH, shuffling_queue_capacity=100_000)
        yield from _first_rows(len(batch["label"]) for batch in loader)


def petastorm_rows(table: Path) -> Iterator[int]:
    """Petastorm's DataLoader, row by row, shuffled by a buffer; on the first rows only."""
    from petastorm import make_batch_reader
    from petastorm.pytorch import DataLoader

    with make_batch_reader(_urls(table), num_epochs=1, workers_count=2, shuffle_row_groups=True) as reader:
        loader = DataLoader(reader, batch_size=BATCH, shuffling_queue_capacity=5_000)
        yield from _first_rows((len(batch["label"]) for batch in loader), ROWS_OF_SLOWEST)


def _urls(table: Path) -> list[str]:
    return [f"file://{path}" for path in files_of(table)]


def _first_rows(sizes: Iterable[int], wanted: int = ROWS_OF_SLOW) -> Iterator[int]:
    rows = 0
    for size in sizes:
        yield size
        rows += size
        if rows >= wanted:
            return


def mosaic(table: Path) -> Iterator[int]:
    """MosaicML Streaming through torch's DataLoader, from its own copy, shuffled; on the first rows only."""
    from streaming import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(local=str(mosaic_copy(table)), shuffle=True, batch_size=BATCH)
    loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=2)
    yield from _first_rows(len(batch["label"]) for batch in loader)


def mosaic_copy(table: Path) -> Path:
    """Where its copy lies."""
    return table.with_name(f"{table.name}-mosaic")


def copy_for_mosaic(table: Path) -> float:
    """Write MosaicML Streaming's own copy of a table. Returns seconds, those of an earlier run where it is there."""
    import pyarrow.parquet as pq
    from streaming import MDSWriter

    copy = mosaic_copy(table)
    if (copy / "seconds").is_file():
        return float((copy / "seconds").read_text())
    shutil.rmtree(copy, ignore_errors=True)
    started = time.perf_counter()
    first = pq.ParquetFile(files_of(table)[0]).read_row_group(0).slice(0, 1).to_pylist()[0]
    columns = {name: _mosaic_type(name, value) for name, value in first.items()}
    with MDSWriter(out=str(copy), columns=columns) as writer:
        for path in files_of(table):
            for batch in pq.ParquetFile(path).iter_batches():
                arrays = {name: _rows_of(batch.column(name)) for name in columns}
                for values in zip(*arrays.values(), strict=True):
                    writer.write(dict(zip(arrays, values, strict=True)))
    seconds = time.perf_counter() - started
    (copy / "seconds").write_text(str(seconds))
    return seconds


_LISTS = {"x": "float32", "numbers": "float32", "ids": "int64", "image": "uint8"}


def _mosaic_type(name: str, value: Any) -> str:
    return f"ndarray:{_LISTS[name]}:{len(value)}" if name in _LISTS else "int"


def _rows_of(column: Any) -> Any:
    """A column's values, a row each: arrays of lists, and numbers."""
    import numpy as np

    if hasattr(column, "flatten") and hasattr(column, "offsets"):
        return column.flatten().to_numpy().reshape(len(column), -1)
    values = column.to_pylist()
    return [np.frombuffer(value, np.uint8) for value in values] if isinstance(values[0], bytes) else values


def huggingface(table: Path) -> Iterator[int]:
    """Hugging Face datasets, streaming, shuffled by a buffer; on the first rows only."""
    from datasets import load_dataset

    files = [str(path) for path in files_of(table)]
    dataset = load_dataset("parquet", data_files=files, split="train", streaming=True)
    shuffled = dataset.shuffle(seed=0, buffer_size=20_000).with_format("torch")
    yield from _first_rows(len(batch["label"]) for batch in shuffled.iter(batch_size=BATCH))


def pyarrow(table: Path) -> Iterator[int]:
    """Reading alone, on one thread, in order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_cpu_count(1)
    for path in files_of(table):
        yield pq.ParquetFile(path).read(use_threads=False).num_rows


def epoch_by_epoch(read: Callable[[Path], Iterator[int]]) -> Callable[[Path, int], Iterator[Iterator[int]]]:
    """A reader of one epoch, again and again."""
    return lambda table, epochs: (read(table) for _ in range(epochs))


READERS: dict[str, Callable[[Path, int], Iterator[Iterator[int]]]] = {
    "headrace": headrace,
    "headrace_in_order": headrace_in_order,
    **{f.__name__: epoch_by_epoch(f) for f in (petastorm_batched, petastorm_rows, mosaic, huggingface, pyarrow)},
}


def main(name: str, table: str, epochs: int) -> dict[str, Any]:
    """Rows per second of each epoch; the first warms up and is left out."""
    if name.startswith("headrace"):
        import torch

        from pipelines.stream.memory import keep_freed_memory

        keep_freed_memory()
        torch.set_num_threads(1)
    rates = []
    started = time.perf_counter()
    for sizes in READERS[name](Path(table), epochs + 1):
        rows = sum(sizes)
        rates.append(rows / (time.perf_counter() - started))
        started = time.perf_counter()
    return {"rows_per_s": rates[1:]}


if __name__ == "__main__":
    if sys.argv[1] == "copy_for_mosaic":
        print(json.dumps(copy_for_mosaic(Path(sys.argv[2]))))
    else:
        print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
    sys.stdout.flush()
    os._exit(0)
