"""Serve MLflow's pages on the lake's runs and models.

python jobs/ui.py --port 5000
"""

import argparse
import os
import sys

from pipelines import tracking
from pipelines.errors import HeadraceError

if __name__ == "__main__":
    jobs = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs.add_argument("--port", type=int, default=5000)
    arguments = jobs.parse_args()
    try:
        tracking.create_store()
    except HeadraceError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"http://127.0.0.1:{arguments.port}   (Ctrl-C ends it)", flush=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(arguments.port)]
    os.execv(sys.executable, [*command, *tracking.ui_arguments()])  # noqa: S606
