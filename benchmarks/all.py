"""The benchmarks that take minutes, each in a process of its own: `make bench`. Exit code 1 where a goal was missed."""

import subprocess
import sys

NAMES = ["epoch", "scoring", "driver_memory"]


def main() -> int:
    """Returns the exit code."""
    codes = {}
    for name in NAMES:
        print(f"\n{name}", flush=True)
        codes[name] = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode
    failed = [name for name, code in codes.items() if code]
    print(f"\n{'missed or failed: ' + ', '.join(failed) if failed else 'all goals met'}; tables in build/bench")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
