"""One loader reads one table, an epoch at a time; a process of its own:

    python -m benchmarks.readers LOADER TABLE EPOCHS

Prints the rows per second of each epoch, as JSON. All give batches of 1,024 rows as torch tensors but pyarrow, which
reads the files alone, on one thread: the limit.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

BATCH = 1024
ROWS_OF_SLOW = 100_000  # of a loader that goes row by row only so many are read


def files_of(table: Path) -> list[Path]:
    """The table's Parquet files."""
    return sorted(table.glob("*.parquet"))


def headrace(table: Path, *, shuffle: bool = True) -> Iterator[int]:
    """Exact, shuffled; the order of the whole epoch is new each time."""
    from pipelines.stream import EpochReceipt, LaneLoader, Snapshot

    snapshot = Snapshot.open(table)
    receipt = EpochReceipt(snapshot)
    with LaneLoader(snapshot, BATCH, lanes=8, seed=time.monotonic_ns(), shuffle=shuffle, epochs=1) as loader:
        for batch in loader:
            receipt.add(batch)
            yield batch.rows
    receipt.check(epoch=0)


def headrace_in_order(table: Path) -> Iterator[int]:
    """Without shuffling."""
    return headrace(table, shuffle=False)


def petastorm_batched(table: Path) -> Iterator[int]:
    """Petastorm's BatchedDataLoader, shuffled by a buffer."""
    from petastorm import make_batch_reader
    from petastorm.pytorch import BatchedDataLoader

    urls = [f"file://{path}" for path in files_of(table)]
    with make_batch_reader(urls, num_epochs=1, workers_count=2, shuffle_row_groups=True) as reader:
        for batch in BatchedDataLoader(reader, batch_size=BATCH, shuffling_queue_capacity=100_000):
            yield len(batch["label"])


def petastorm_rows(table: Path) -> Iterator[int]:
    """Petastorm's DataLoader, row by row, shuffled by a buffer; on the first rows only."""
    from petastorm import make_batch_reader
    from petastorm.pytorch import DataLoader

    rows = 0
    urls = [f"file://{path}" for path in files_of(table)]
    with make_batch_reader(urls, num_epochs=1, workers_count=2, shuffle_row_groups=True) as reader:
        for batch in DataLoader(reader, batch_size=BATCH, shuffling_queue_capacity=20_000):
            rows += len(batch["label"])
            yield len(batch["label"])
            if rows >= ROWS_OF_SLOW:
                return


def mosaic(copy: Path) -> Iterator[int]:
    """MosaicML Streaming through torch's DataLoader, from its own copy, shuffled."""
    import torch
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(copy), shuffle=True, batch_size=BATCH, num_canonical_nodes=1)
    for batch in torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=2):
        yield len(batch["label"])


def huggingface(table: Path) -> Iterator[int]:
    """Hugging Face datasets, streaming, shuffled by a buffer."""
    from datasets import load_dataset

    files = [str(path) for path in files_of(table)]
    dataset = load_dataset("parquet", data_files=files, split="train", streaming=True)
    for batch in dataset.shuffle(seed=0, buffer_size=20_000).with_format("torch").iter(batch_size=BATCH):
        yield len(batch["label"])


def pyarrow(table: Path) -> Iterator[int]:
    """Reading alone, on one thread, in order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_cpu_count(1)
    for path in files_of(table):
        yield pq.ParquetFile(path).read(use_threads=False).num_rows


READERS: dict[str, Callable[[Path], Iterable[int]]] = {
    "headrace": headrace,
    "headrace_in_order": headrace_in_order,
    "petastorm_batched": petastorm_batched,
    "petastorm_rows": petastorm_rows,
    "mosaic": mosaic,
    "huggingface": huggingface,
    "pyarrow": pyarrow,
}


def main(name: str, table: str, epochs: int) -> dict[str, Any]:
    """Rows per second of each epoch; the first warms up and is left out."""
    if name.startswith("headrace"):
        import torch

        from pipelines.stream.memory import keep_freed_memory

        keep_freed_memory()
        torch.set_num_threads(1)
    rates = []
    for _ in range(epochs + 1):
        started = time.perf_counter()
        rows = sum(READERS[name](Path(table)))
        rates.append(rows / (time.perf_counter() - started))
    return {"rows_per_s": rates[1:]}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
    sys.stdout.flush()
    os._exit(0)
