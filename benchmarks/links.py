"""Links of a chosen rate on one machine: network namespaces, a switch between them, and tc's token bucket.

Each namespace has one interface, `eth0`, a veth pair to a bridge that stands in a namespace of its own. What leaves a
namespace passes a token bucket, and what the switch sends to it another one: so a link has its rate in both directions, as
on a switch of full duplex. TCP is reno's: cubic takes the bucket's own queue for a crowded path and leaves a fifth of the
link unused. All names carry this process's id; what a killed run left is removed by the next one.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TypeVar

Seen = TypeVar("Seen")

INTERFACE = "eth0"
_CLONE_NEWNET = 0x40000000  # setns(2)
_CONGESTION_CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")
_PREFIX = "headrace"
_QUEUE_MS = 100  # what a queue holds; behind it packets are dropped, and TCP slows down
_BURST_MS, _LEAST_BURST = 1.0, 3_200  # bytes that pass at once, so that a message cannot slip through unshaped


class NotPermitted(Exception):
    """Network namespaces cannot be made here."""


class Links:
    """`num` namespaces that reach each other through one switch. A context manager; all is removed when it ends.

    Raises:
        NotPermitted: On entry, with the reason.
    """

    def __init__(self, num: int) -> None:
        self._names = [f"{_PREFIX}-{os.getpid()}-{place}" for place in range(num)]
        self._switch = f"{_PREFIX}-{os.getpid()}-switch"

    def __enter__(self) -> "Links":
        if missing := [tool for tool in ("ip", "tc") if not shutil.which(tool)]:
            raise NotPermitted(f"{' and '.join(missing)} not found on PATH; install iproute2, or put /usr/sbin on it")
        _remove_leftovers()
        try:
            self._make()
        except subprocess.CalledProcessError as error:
            self._remove()
            raise NotPermitted(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from None
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._remove()

    def _make(self) -> None:
        _run("ip", "netns", "add", self._switch)
        _run("ip", "-n", self._switch, "link", "add", "switch", "type", "bridge")
        _run("ip", "-n", self._switch, "link", "set", "switch", "up")
        for place, name in enumerate(self._names):
            port = f"port{place}"
            _run("ip", "netns", "add", name)
            _run(
                *("ip", "link", "add", INTERFACE, "netns", name),
                *("type", "veth", "peer", "name", port, "netns", self._switch),
            )
            _run("ip", "-n", self._switch, "link", "set", port, "master", "switch", "up")
            _run("ip", "-n", name, "addr", "add", f"{self.address(place)}/24", "dev", INTERFACE)
            for device in ("lo", INTERFACE):
                _run("ip", "-n", name, "link", "set", device, "up")
            _within(name, lambda: _CONGESTION_CONTROL.write_text("reno"))

    def _remove(self) -> None:
        for name in (*self._names, self._switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def address(self, place: int) -> str:
        """Of a namespace, as the others reach it."""
        return f"10.77.0.{place + 1}"

    def set_rate(self, mbit_per_s: float | None) -> None:
        """Of all links, in both directions; None for no limit."""
        ends = [(name, INTERFACE) for name in self._names]
        ends += [(self._switch, f"port{place}") for place in range(len(self._names))]
        for name, device in ends:
            subprocess.run(["tc", "-n", name, "qdisc", "del", "dev", device, "root"], capture_output=True, check=False)
            if mbit_per_s is not None:
                burst = max(_LEAST_BURST, round(mbit_per_s * 1e6 / 8 * _BURST_MS / 1e3))
                _run(
                    *("tc", "-n", name, "qdisc", "add", "dev", device, "root", "tbf"),
                    *("rate", f"{mbit_per_s:g}mbit", "burst", f"{burst}b", "latency", f"{_QUEUE_MS}ms"),
                )

    def enter(self, place: int) -> None:
        """Move this thread, and those that it starts, into a namespace."""
        _enter(self._names[place])

    def sent_bytes(self) -> int:
        """What all namespaces sent by now, as the switch received it, headers included."""

        def count() -> int:
            lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
            return sum(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("port"))

        return _within(self._switch, count)


def on_links(title: str, num: int, measure: Callable[[Links], int]) -> int:
    """The exit code of what is measured on `num` links; 77, with a line, where they cannot be had."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # gloo warns of addresses without a name
    os.environ["OMP_NUM_THREADS"] = "1"  # as ranks have it from their launcher
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that namespaces are removed then, too
    try:
        with Links(num) as links:
            return measure(links)
    except NotPermitted as error:
        print(f"{title}: network namespaces are not permitted here, nothing was measured: {error}")
        return os.EX_NOPERM


def _within(name: str, look: Callable[[], Seen]) -> Seen:
    """What is seen in a namespace, by a thread of its own."""
    with ThreadPoolExecutor(1, initializer=_enter, initargs=(name,)) as inside:
        return inside.submit(look).result()


def _enter(name: str) -> None:
    handle = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(handle, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(handle)


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True)


def _remove_leftovers() -> None:
    """Namespaces of runs whose process is gone."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
    for line in listed.splitlines():
        name = line.split()[0]
        prefix, _, rest = name.partition("-")
        if prefix == _PREFIX and not Path("/proc", rest.partition("-")[0]).exists():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
