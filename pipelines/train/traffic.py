"""What a process sends and receives: the kernel's own counters of its TCP connections.

gloo, torch's store and gRPC all use TCP, and DistributedDataParallel's exchange does not pass through Python, so that
nothing nearer to the code could count it. What NCCL moves over NVLink or InfiniBand is not seen.
"""

import os
import socket
import struct
import sys
from pathlib import Path
from typing import NamedTuple

_TCP_INFO = 11  # getsockopt(2)
_SENT_AT, _RECEIVED_AT, _SIZE = 200, 128, 256  # tcpi_bytes_sent, tcpi_bytes_received of struct tcp_info, linux/tcp.h


class Traffic(NamedTuple):
    """Bytes over the connections that are open."""

    sent: int = 0
    received: int = 0

    def since(self, before: "Traffic") -> "Traffic":
        """What came on top; connections that were closed since count as nothing."""
        return Traffic(max(0, self.sent - before.sent), max(0, self.received - before.received))


def traffic() -> Traffic:
    """Of this process up to now; nothing where the kernel is not Linux. Some 0.1 ms."""
    sent = received = 0
    for path in Path("/proc/self/fd").iterdir() if sys.platform == "linux" else ():
        try:
            if not str(path.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(path.name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _SIZE)
        except OSError:  # closed meanwhile, or not of TCP
            continue
        if len(info) >= _SENT_AT + 8:
            sent += struct.unpack_from("Q", info, _SENT_AT)[0]
            received += struct.unpack_from("Q", info, _RECEIVED_AT)[0]
    return Traffic(sent, received)
