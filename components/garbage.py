"""Python's garbage collector in short processes: most of what it looks through are imported modules, which stay anyway."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


def skip_at_exit() -> None:
    """At the end of this process nothing is searched for garbage any more: it all goes with the process.

    Call it first: functions for the exit run in reverse order.
    """
    # Frozen objects are left out. After an import of torch or MLflow, searching them takes a third of the import's time.
    atexit.register(gc.freeze)


def collect_seldom() -> None:
    """For a process that ends soon: garbage in cycles is looked for every 20,000 new objects instead of 700."""
    gc.set_threshold(20_000)


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is looked for meanwhile; for imports, and for what is short."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
