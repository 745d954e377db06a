"""Links between namespaces carry bytes that are counted, leave nothing behind, and say where they cannot be had."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.links import Links, NotPermitted

ROOT = Path(__file__).parents[1]
REFUSING = "#!/bin/sh\necho 'mount --make-shared /run/netns failed: Operation not permitted' >&2\nexit 1\n"


def names() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


def test_bytes_are_counted_at_the_switch_and_nothing_is_left() -> None:
    sent = 300_000
    try:
        with Links(2) as links:
            links.set_rate(1000)
            receiver = os.fork()
            if not receiver:
                links.enter(0)
                connection, _ = socket.create_server((links.address(0), 5000)).accept()
                while connection.recv(1 << 20):
                    pass
                os._exit(0)
            sender = os.fork()
            if not sender:
                links.enter(1)
                before = links.sent_bytes()
                while True:
                    try:
                        connection = socket.create_connection((links.address(0), 5000), timeout=10)
                        break
                    except ConnectionRefusedError:
                        continue
                connection.sendall(bytes(sent))
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1)
                os._exit(0 if sent <= links.sent_bytes() - before < 1.2 * sent else 1)
            assert [os.waitpid(child, 0)[1] for child in (receiver, sender)] == [0, 0]
            raise InterruptedError
    except NotPermitted as error:
        pytest.skip(str(error))
    except InterruptedError:
        assert f"-{os.getpid()}-" not in names()


def test_what_a_killed_run_left_is_removed_by_the_next() -> None:
    lost = "import os\nfrom benchmarks.links import Links\nLinks(1).__enter__()\nprint(os.getpid(), flush=True)\nos._exit(9)"
    done = subprocess.run([sys.executable, "-c", lost], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 9:
        pytest.skip(done.stderr[-200:])
    assert f"-{done.stdout.strip()}-" in names()
    with Links(1):
        assert f"-{done.stdout.strip()}-" not in names()


@pytest.mark.parametrize("name", ["comm", "auto"])
@pytest.mark.parametrize("tools", [{}, {"ip": REFUSING, "tc": REFUSING}])
def test_a_benchmark_says_where_it_cannot_measure(tmp_path: Path, tools: dict[str, str], name: str) -> None:
    for tool, text in tools.items():
        (tmp_path / tool).write_text(text)
        (tmp_path / tool).chmod(0o755)
    table = ROOT / "build" / "bench" / f"{name}.json"
    before = table.read_bytes() if table.is_file() else None
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}"],
        cwd=ROOT,
        env=os.environ | {"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 77
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"bench-{name}: network namespaces are not permitted here, nothing was measured: ")
    assert ("Operation not permitted" if tools else "ip and tc not found") in line
    assert (table.read_bytes() if table.is_file() else None) == before
