"""Small real data sets that an installed package ships, exported as raw files."""

import gzip
import struct
from pathlib import Path

import numpy as np


def digits(folder: Path) -> None:
    """Write scikit-learn's 1,797 handwritten digits of 8 x 8 pixels as IDX files.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, CC BY 4.0. Pixels 0 to 16
    become 0 to 255.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)
    labels = data.target.astype(np.uint8)
    num, height, width = pixels.shape
    _write(folder / "digits-labels-idx1-ubyte.gz", struct.pack(">2I", 0x801, num) + labels.tobytes())
    _write(folder / "digits-images-idx3-ubyte.gz", struct.pack(">4I", 0x803, num, height, width) + pixels.tobytes())


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content, mtime=0))
