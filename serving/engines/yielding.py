"""How a loading engine gives way to the one that answers."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
from collections.abc import Sequence
from typing import Protocol

YIELD_WAIT_S = 0.04
"""A release that is loading stands still while a picture of those that are served would wait longer than this."""
_YIELD_S, _LOAD_S = 1.0, 0.01
"""How long it stands still at most at a time, and how long it goes on then."""
_MOST_STILL_S = 60.0
"""How long it stands still in all: then it goes on whatever waits, so that also under full load a release comes up."""


class Served(Protocol):
    """A deployment that answers."""

    @property
    def behind(self) -> bool:
        """Whether a picture would wait too long now."""
        ...

    def be_patient(self) -> None:
        """Take pictures with a longer wait for a moment."""
        ...


class Yielding:
    """Lets a process that loads a release stand still while pictures of those that are served wait.

    Priorities would do the same, but one that was lowered cannot be raised again without privileges.
    """

    def __init__(self, process: subprocess.Popen[bytes], served: Sequence[Served]) -> None:
        self._process, self._served = process, served
        self._loop = asyncio.get_running_loop()
        self._stood_still_s = 0.0
        self._stopped_at: float | None = None
        self._task = self._loop.create_task(self._run())

    @property
    def stood_still_s(self) -> float:
        """In all, until now."""
        return self._stood_still_s + (self._loop.time() - self._stopped_at if self._stopped_at is not None else 0.0)

    async def _run(self) -> None:
        while self._served:
            await self._a_moment()
            if not self._behind() or self._stood_still_s >= _MOST_STILL_S:
                continue
            self._stopped_at = stopped_at = self._loop.time()
            _signal(self._process, signal.SIGSTOP)
            while self._behind() and self._loop.time() < stopped_at + _YIELD_S:
                await self._a_moment()
            self._go_on()

    async def _a_moment(self) -> None:
        for deployment in self._served:
            deployment.be_patient()
        await asyncio.sleep(_LOAD_S)

    def _behind(self) -> bool:
        return any(deployment.behind for deployment in self._served)

    def _go_on(self) -> None:
        if self._stopped_at is not None:
            self._stood_still_s, self._stopped_at = self.stood_still_s, None
        _signal(self._process, signal.SIGCONT)

    def end(self) -> None:
        """Let it go on for good."""
        self._task.cancel()
        self._go_on()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)
