"""How a process that loads keeps its memory; glibc's defaults cost a loader time and let it grow."""

import ctypes
import sys

import pyarrow as pa

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # mallopt(3)
_KEPT_BYTES, _HEAP_ALLOCATION_BYTES, _ARENAS = 256 << 20, 32 << 20, 2


def keep_freed_memory() -> None:
    """Have the allocators keep what a batch frees for the next: giving pages back and faulting them in costs.

    Of glibc, up to 256 MiB stay with the process. All threads share two arenas, since each would keep what it freed:
    with one an epoch's threads each, five epochs of 276 MB took 1.7 times the memory. Arrow takes its buffers from
    mimalloc, since between the batches' arrays glibc's arenas fall to pieces (docs/engines.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _HEAP_ALLOCATION_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_ARENA_MAX, _ARENAS)
    if "mimalloc" in pa.supported_memory_backends():
        pa.set_memory_pool(pa.mimalloc_memory_pool())
