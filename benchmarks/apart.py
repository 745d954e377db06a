"""A measure in a process of its own, so that it starts with nothing behind it."""

import json
import os
import subprocess
import sys
from typing import Any

from benchmarks.report import FOLDER


def run(module: str, *arguments: object, python: str = sys.executable) -> Any:
    """The JSON that a module of the benchmarks prints last, run in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [python, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
