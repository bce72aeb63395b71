"""What a long operation tells while it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Told how far a long operation is; silent by default."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


def silent(done: int, total: int, note: str = "") -> None:
    """The Progress that shows nothing."""


class StoppedEarly(Exception):
    """Raised by a sink that wants no further epoch: the training ends without a result. No person has to act."""


class MetricSink(Protocol):
    """Receives live training metrics; must never fail training, nor block it, but for a search, which may end it."""

    def log(self, epoch: int, metrics: Mapping[str, float]) -> None: ...


class NullSink:
    """The MetricSink that keeps nothing."""

    def log(self, epoch: int, metrics: Mapping[str, float]) -> None:
        return None
