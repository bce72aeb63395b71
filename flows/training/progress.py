"""How far a training is, for whoever looks at it from another process: a small file in its run folder while it goes on.

It is written at most once a second, and a disk that does not take it stops no training. A run that was killed leaves its
file; that its process has ended tells so.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.store import write_atomically
from flows.workspace.settings import began
from flows.workspace.workspace import Workspace

if TYPE_CHECKING:
    from flows.terminal import Console

PROGRESS = "progress.json"
_EVERY_S = 1.0


@dataclass(frozen=True)
class RunProgress:
    """How far a run is that goes on now."""

    run: str
    model: str
    asked_by: str
    since: str
    """UTC, ISO 8601."""
    stage: str
    number: int
    """Of the stage, from 1."""
    num_stages: int
    done: int
    total: int
    """Of what the stage counts; 0 where it counts nothing."""
    note: str

    def told(self) -> str:
        """In a line."""
        counted = f", {self.done} of {self.total}" if self.total else ""
        note = f" ({self.note})" if self.note else ""
        return f"{self.run}: stage {self.number} of {self.num_stages}, {self.stage}{counted}{note}"


@contextlib.contextmanager
def reported(console: Console, folder: Path, *, model: str, asked_by: str) -> Iterator[None]:
    """Let others see how far the run in `folder` is, as long as the context lasts."""
    report = _Report(folder / PROGRESS, model, asked_by)
    console.heard = report
    try:
        yield
    finally:
        console.heard = None
        with contextlib.suppress(OSError):
            report.path.unlink(missing_ok=True)


class _Report:
    """Writes what a console hears."""

    def __init__(self, path: Path, model: str, asked_by: str) -> None:
        self.path = path
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._facts = {"run": path.parent.name, "model": model, "asked_by": asked_by, "since": since}
        self._process = {"pid": os.getpid(), "began": began(os.getpid())}
        self._lock = threading.Lock()
        self._last = 0.0

    def __call__(self, stage: str, number: int, num_stages: int, done: int, total: int, note: str) -> None:
        with self._lock:
            if done and time.monotonic() - self._last < _EVERY_S:
                return
            self._last = time.monotonic()
            told = RunProgress(
                **self._facts, stage=stage, number=number, num_stages=num_stages, done=done, total=total, note=note
            )
            with contextlib.suppress(OSError):
                write_atomically(self.path, json.dumps(asdict(told) | self._process).encode())


def running(workspace: Workspace) -> list[RunProgress]:
    """The runs that go on in a workspace now, the first started first; what is left of runs that were killed is none."""
    found = [told for path in workspace.runs.glob(f"*/{PROGRESS}") if (told := _read(path)) is not None]
    return sorted(found, key=lambda each: (each.since, each.run))


def _read(path: Path) -> RunProgress | None:
    try:
        told: dict[str, Any] = json.loads(path.read_text())
        alive = began(told.pop("pid")) == told.pop("began")
        return RunProgress(**told) if alive else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it ended at this moment, or the file is not ours
