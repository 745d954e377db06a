"""Check what a machine needs before the set-up, a line each: what is wanted, what is there, what brings it.

    python3 jobs/doctor.py

Uses the standard library only, and any Python 3, so that it can say what is missing.
"""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PYTHONS = ((3, 10), (3, 12))
JAVAS = (17, 21)
MEMORY_GB, DISK_GB = 4, 10
UI_PORT = 5000


def check_python():
    seen = sys.version_info[:2]
    good = PYTHONS[0] <= seen <= PYTHONS[1]
    hint = "install python3.11 and say `make PYTHON=python3.11 ...`"
    return good, "Python 3.10 to 3.12", "{}.{}".format(*seen), hint


def check_venv():
    good = all(importlib.util.find_spec(name) for name in ("venv", "ensurepip"))
    return (
        good,
        "Python's venv",
        "there" if good else "missing",
        "apt install python{}.{}-venv".format(*sys.version_info[:2]),
    )


def check_java():
    home = os.environ.get("JAVA_HOME")
    java = os.path.join(home, "bin", "java") if home else shutil.which("java")
    seen = "none"
    if java and os.path.exists(java):
        text = subprocess.run([java, "-version"], stderr=subprocess.PIPE, stdout=subprocess.PIPE).stderr.decode()
        found = re.search(r'version "(?:1\.)?(\d+)', text)
        seen = found.group(1) if found else text.strip()[:60]
    return (
        seen in [str(java) for java in JAVAS],
        "Java 17 or 21",
        seen,
        "apt install openjdk-17-jre-headless, or set JAVA_HOME",
    )


def check_memory():
    try:
        gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, OSError):
        return True, "memory of {} GB".format(MEMORY_GB), "unknown", ""
    return gb >= MEMORY_GB, "memory of {} GB".format(MEMORY_GB), "{:.1f} GB".format(gb), "use a larger machine"


def check_disk():
    free = shutil.disk_usage(ROOT).free / 1e9
    installed = os.path.isdir(os.path.join(ROOT, ".venv"))
    wanted = 1 if installed else DISK_GB
    return free >= wanted, "{} GB free on disk".format(wanted), "{:.1f} GB".format(free), "free space under " + ROOT


def check_loopback():
    try:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
    except OSError as error:
        return False, "ports on 127.0.0.1", str(error), "allow processes to listen on 127.0.0.1"
    return True, "ports on 127.0.0.1", "free", ""


def check_ui_port():
    with socket.socket() as client:
        taken = client.connect_ex(("127.0.0.1", UI_PORT)) == 0
    hint = "no harm: `make ui PORT=5001`"
    return None if taken else True, "port {} for make ui".format(UI_PORT), "taken" if taken else "free", hint


def check_versions():
    """The environment against constraints.txt, where it is set up."""
    python = os.path.join(ROOT, ".venv", "bin", "python")
    if not os.path.exists(python):
        return None, "packages of constraints.txt", "not set up yet", "make setup"
    with open(os.path.join(ROOT, "constraints.txt")) as file:
        wanted = dict(
            re.findall(r"^(pyspark|delta-spark|petastorm|torch|mlflow|pyarrow)==([^\s;]+)", file.read(), re.M)
        )
    code = "import importlib.metadata as m, sys; print(*[m.version(n) for n in sys.argv[1:]])"
    run = subprocess.run([python, "-c", code] + list(wanted), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    seen = dict(zip(wanted, run.stdout.decode().split()))
    other = ["{} {} for {}".format(n, seen.get(n, "missing"), v) for n, v in wanted.items() if seen.get(n) != v]
    return (True if not other else None), "packages of constraints.txt", ", ".join(other) or "there", "make setup"


CHECKS = (check_python, check_venv, check_java, check_memory, check_disk, check_loopback, check_ui_port, check_versions)


def main():
    """Print a line a check; 1 where something needed is missing (a line with `note` is not needed)."""
    quiet = "--quiet" in sys.argv
    failed = 0
    for check in CHECKS:
        good, wanted, seen, hint = check()
        mark = {True: "ok", None: "note", False: "MISSING"}[good]
        failed += good is False
        if good is False or not quiet:
            print("{:<8} {}: {}{}".format(mark, wanted, seen, "" if good else "; " + hint))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
