"""Failures at the N-th call: every write, rename and remote call is a place where a process can die."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest


class Died(BaseException):
    """What a killed process would not even see; no handler of ours may swallow it."""


def die(_: str) -> None:
    raise Died


class Failpoints:
    """Counts calls of the named functions and fails at the `nth`, before or after it did its work.

    How it fails is `fail`'s affair: it is given the function's name, and raises.
    """

    def __init__(
        self,
        places: Sequence[tuple[Any, str]],
        *,
        nth: int,
        when: Literal["before", "after"],
        fail: Callable[[str], None] = die,
    ) -> None:
        self.places, self.nth, self.when, self.fail = places, nth, when, fail
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
                    self.fail(name)
            result = real(*args, **kwargs)
            if mine:
                self.fail(name)
            return result

        return counting
