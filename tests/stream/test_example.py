"""The example of the documentation runs under plain torchrun, without a JVM, and goes on at another number of ranks."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
from deltalake import write_deltalake

from tests.conftest import ROOT


def torchrun(ranks: int, *arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, "docs/examples/own_loop.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_example_runs_and_goes_on(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for _ in range(3):
        x = generator.normal(size=(700, 4))
        table = pa.table({"x": list(x.astype(np.float32)), "label": pa.array((x[:, 0] > 0).astype(np.int64))})
        write_deltalake(str(tmp_path / "t"), table, mode="append")
    state = tmp_path / "state.json"
    lines = torchrun(2, str(tmp_path / "t"), str(state)).splitlines()
    assert [line.split(",")[0] for line in lines] == [f"epoch {epoch}: 9 steps" for epoch in range(3)]
    kept = json.loads(state.read_text())
    assert (kept["epoch"], kept["step"]) == (3, 0)
    state.write_text(json.dumps(kept | {"epoch": 2, "step": 4}))
    (line,) = torchrun(1, str(tmp_path / "t"), str(state)).splitlines()
    assert line.startswith("epoch 2: ")
