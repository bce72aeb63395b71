"""How many processes a trial has cost, in a file of the study's folder: a process that the system kills can tell no more."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path

from components.store import write_atomically

ATTEMPTS = "attempts.json"


class Attempts:
    """By trial, the processes that began with it since it last came to a further epoch, and that epoch."""

    def __init__(self, folder: Path) -> None:
        self._file, self._lock = folder / ATTEMPTS, threading.Lock()
        try:
            self._told: dict[str, list[int]] = json.loads(self._file.read_text())
        except (OSError, ValueError):
            self._told = {}

    def of(self, number: int) -> int:
        """The processes that a trial has cost."""
        return self._told.get(str(number), [0, 0])[0]

    def begin(self, number: int) -> None:
        """Another process begins with a trial."""
        self._write(number, [self.of(number) + 1, self._epoch(number)])

    def heard(self, number: int, epoch: int) -> None:
        """A trial came to an epoch: where none came to it before, only this process counts from here on."""
        if epoch > self._epoch(number):
            self._write(number, [1, epoch])

    def forget(self, number: int) -> None:
        """A trial came to its end, or what ended it is none of its own."""
        self._write(number, None)

    def _epoch(self, number: int) -> int:
        return self._told.get(str(number), [0, 0])[1]

    def _write(self, number: int, told: list[int] | None) -> None:
        with self._lock:
            self._told.pop(str(number), None)
            if told is not None:
                self._told[str(number)] = told
            with contextlib.suppress(OSError):  # the training itself says that a disk is full
                self._file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self._file, json.dumps(self._told).encode())
