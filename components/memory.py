"""Memory that a step frees serves the next one: glibc would give every large piece back, and have it zeroed anew."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""As malloc.h numbers them."""


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
