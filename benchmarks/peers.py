"""Loaders of others, each in an environment of its own under `build/bench/peers`.

The environment sees the project's packages behind its own, so that torch is not fetched again.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.report import FOLDER

REQUIREMENTS = {
    "mosaic": ["mosaicml-streaming==0.13.0"],
    "huggingface": ["datasets==5.2.0", "numpy>=2"],
}


def python_of(peer: str) -> str | None:
    """The interpreter of the peer's environment, made where it is missing; None where it does not install."""
    folder = FOLDER / "peers" / peer
    python = folder / "bin" / "python"
    if (folder / "done").is_file():
        return str(python)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "behind.pth").write_text(f"{Path(torch.origin).parents[1]}\n")
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS[peer]]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{peer} does not install here: {done.stderr.strip().splitlines()[-1]}", flush=True)
        return None
    (folder / "done").touch()
    return str(python)
