"""Memory of this process: its height, and how what a step frees serves the next one.

glibc would give every large piece back, and have it zeroed anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""As malloc.h numbers them."""


def peak_bytes() -> int:
    """The most memory that this process ever had resident."""
    with contextlib.suppress(OSError):
        # What getrusage says of a new process on Linux is the height of the one that started it.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # In bytes on macOS, in kibibytes elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def reused() -> Iterator[None]:
    """What is freed within stays with the process until the end; nothing changes where the C library is not glibc.

    Afterwards its bounds are those that it reaches by itself in a process that frees large pieces: once one of them was set,
    it moves them no more.

    Activations of a batch are larger than the 32 MiB from which glibc maps each piece on its own: infra/decisions/0017.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt, trim = library.mallopt, library.malloc_trim
    except (AttributeError, OSError, TypeError):
        yield
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(_MMAP_MAX, 65_536)
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 64 << 20)
        trim(0)
