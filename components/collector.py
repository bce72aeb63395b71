"""Python's garbage collector where nearly all objects are imported modules: they stay, and are searched in vain."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


def skip_at_exit() -> None:
    """At its end, this process is not searched for garbage once more: all of it goes anyway.

    Exit functions run in reverse order, so call it first; what later ones make is still searched.
    """
    atexit.register(gc.freeze)


def collect_seldom() -> None:
    """For a process that does one thing and ends: garbage in cycles waits for 20,000 new objects, not for hundreds."""
    gc.set_threshold(20_000)


@contextmanager
def kept() -> Iterator[None]:
    """What is made meanwhile stays: it is not searched for garbage, now or later. For imports, and commands that end.

    For the main thread, and where no other thread works: the switch is the whole process's, and so is what is kept.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        # Without this the first collection would look through all that was made.
        gc.freeze()
        if was_on:
            gc.enable()
