"""Failures at the N-th call: every write, rename and remote call is a place where a process can die."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest


class Died(BaseException):
    """What a killed process would not even see; no handler of ours may swallow it."""


class Failpoints:
    """Counts calls of the named functions and dies at the `nth`, before or after it did its work."""

    def __init__(self, places: Sequence[tuple[Any, str]], *, nth: int, when: Literal["before", "after"]) -> None:
        self.places, self.nth, self.when = places, nth, when
        self.calls = 0
        self.hit = ""

    def __call__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for owner, name in self.places:
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name), name))

    def _wrapped(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            mine = self.calls == self.nth
            if mine:
                self.hit = name
                if self.when == "before":
                    raise Died
            result = real(*args, **kwargs)
            if mine:
                raise Died
            return result

        return counting
