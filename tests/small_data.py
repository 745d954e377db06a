"""Small copies of the real data sets, laid out as they are, for tests that run whole workloads."""

import gzip
import struct
from pathlib import Path

TEXT = {
    "adult/adult.data": 1500,
    "adult/adult.test": 600,
    "libsvm/a9a": 1500,
    "libsvm/a9a.t": 600,
    "credit-default-taiwan/UCI_Credit_Card.csv": 1500,
    "california-housing/housing.csv": 1500,
    "tinyshakespeare/input.txt": 900,
    "wikitext-2/valid.txt": 900,
    "wikitext-2/test.txt": 500,
}
IDX = {"mnist/train": 1200, "mnist/t10k": 400}


def copy_small(source: Path, target: Path) -> Path:
    """The first rows of each set under `target`."""
    for name, lines in TEXT.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with (source / name).open() as file:
            (target / name).write_text("".join(line for _, line in zip(range(lines), file, strict=False)))
    for name, rows in IDX.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        _cut(source, target, f"{name}-images-idx3-ubyte.gz", header=16, rows=rows, row_bytes=784)
        _cut(source, target, f"{name}-labels-idx1-ubyte.gz", header=8, rows=rows, row_bytes=1)
    return target


def _cut(source: Path, target: Path, name: str, *, header: int, rows: int, row_bytes: int) -> None:
    with gzip.open(source / name) as file:
        head, body = file.read(header), file.read(rows * row_bytes)
    head = head[:4] + struct.pack(">I", rows) + head[8:]
    (target / name).write_bytes(gzip.compress(head + body))
