"""What a person sees while a run goes on: live bars on a terminal, plain lines elsewhere, always on stderr."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from components.contracts.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

Heard = Callable[[str, int, int, int, int, str], None]
"""Stage, its number, how many there are, what is done of it, of how much, and a note."""
Say = Callable[[str], None]
"""Says a line to whoever is looking on."""


def to_stderr(line: str) -> None:
    """Say a line beside the answer of a command."""
    print(line, file=sys.stderr, flush=True)


def silent(_: str) -> None:
    """Say nothing."""


class Console:
    """Stage by stage progress. Keeps how long each stage took, for the summary."""

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        self.total = total
        self.durations: dict[str, tuple[float, bool]] = {}
        """Seconds and whether the stage came from the store, by stage."""
        self._stage = (0, "")
        self._quiet = quiet
        self._live = not quiet and sys.stderr.isatty()
        self._bars: Bars | None = None
        self._lock = threading.Lock()
        self.heard: Heard | None = None
        """Hears of every stage, and of everything that a stage tells of itself."""

    def __enter__(self) -> Console:
        if self._live:
            from rich.console import Console as Terminal
            from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bars

            self._bars = Bars(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                console=Terminal(stderr=True),
                transient=True,
            )
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def line(self, text: str) -> None:
        """One line that stays."""
        if self._quiet:
            return
        if self._bars is not None:
            self._bars.console.print(text, highlight=False)
        else:
            to_stderr(text)

    def stopped(self) -> str:
        """Where a run that is stopped now stopped, for the person who stopped it."""
        number, name = self._stage
        where = f"at stage {number} of {self.total} ({name})" if number else "before the first stage"
        return f"stopped {where}; the same command goes on from there"

    @contextmanager
    def stage(self, name: str, number: int) -> Iterator[tuple[Progress, list[bool]]]:
        """Show a stage while it runs; put True into the yielded list when its result came from the store."""
        label = f"[{number}/{self.total}] {name}"
        self._stage = (number, name)
        task = self._bars.add_task(label, total=None, note="") if self._bars is not None else None
        if self._bars is None:
            self.line(f"{label} ...")
        if self.heard is not None:
            self.heard(name, number, self.total, 0, 0, "")
        start = last = time.monotonic()
        noted, before = "", (0, 0)

        def progress(done: int, total: int, note: str = "") -> None:
            nonlocal last, noted, before
            with self._lock:
                # Few of the lines are shown: a note holds until the next one, or until something else is counted.
                note = noted = note or (noted if done >= before[0] and total == before[1] else "")
                before = (done, total)
                if self.heard is not None:
                    self.heard(name, number, self.total, done, total, note)
                if self._bars is not None and task is not None:
                    self._bars.update(task, completed=done, total=total, note=f"{done}/{total} {note}".rstrip())
                elif time.monotonic() - last > 10:
                    last = time.monotonic()
                    self.line(f"{label}: {done}/{total} {note}".rstrip())

        cached: list[bool] = []
        try:
            yield progress, cached
        finally:
            if self._bars is not None and task is not None:
                self._bars.remove_task(task)
        elapsed = time.monotonic() - start
        with self._lock:
            self.durations[name] = (elapsed, bool(cached))
        self.line(f"{label}: {'unchanged, from the store' if cached else f'{elapsed:.1f} s'}")


def figure(estimate: Mapping[str, float]) -> str:
    """An estimate as `estimate_json` gives it, with its interval and n."""
    return f"{estimate['value']:.4f} [{estimate['low']:.4f}, {estimate['high']:.4f}] n={estimate['n']}"
