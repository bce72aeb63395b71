"""What a server lets do beside its answers: sealing journals, and sending kept images to where they are kept."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from serving.log.audit import unsealed
from serving.log.captures import CaptureConfig, bytes_in
from serving.metrics import log

_CODE = Path(__file__).resolve().parents[2]
_MANY_JOURNALS = 4
"""More of them that are not sealed, and sealing has fallen behind what is served."""
_LOOK_THERE_S = 600.0
"""How often an address of kept images is looked at while none is sent there."""


class Background:
    """Runs a command in a process of its own, one at a time, whenever there may be something to do for it."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        every_s: float,
        kept: str,
        is_due: Callable[[], bool] = lambda: True,
        is_urgent: Callable[[], bool] = lambda: False,
    ) -> None:
        """Also `every_s`, if it `is_due` then: what a server that was killed left behind, or a store that was away.

        It takes what nobody else wants of the processors, and a small share of them while it `is_urgent`. `kept` says what
        of its work is not lost when it fails.
        """
        self._name, self._kept, self._every_s = name, kept, every_s
        self._is_due, self._is_urgent = is_due, is_urgent
        self._command = [sys.executable, "-m", *command]
        self._wanted = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._wanted.set()

    def _run(self) -> None:
        while True:
            woken = self._wanted.wait(timeout=self._every_s)
            self._wanted.clear()
            if not woken and not self._is_due():
                continue
            # In the session of the server and its engines: Linux shares the processors between sessions first, and only
            # within one does it matter that this is less urgent. A group of its own: a Ctrl-C is for the server.
            try:
                urgent = self._stopping or self._is_urgent()
                done = subprocess.run(
                    [*self._command, "low" if urgent else "idle"],
                    cwd=_CODE,
                    check=False,
                    stdin=subprocess.DEVNULL,
                    process_group=0,
                )
                if done.returncode:
                    log(f"{self._name} failed; {self._kept}", level=logging.ERROR, status=done.returncode)
            except OSError as error:
                # No memory or no descriptor for a process now: the next time is soon.
                log(f"{self._name} did not start; {self._kept}", level=logging.ERROR, problem=str(error))
            if self._stopping and not self._wanted.is_set():
                return

    def close(self, timeout_s: float) -> None:
        """Let it do what there is to do now, then stop."""
        self._stopping = True
        self._wanted.set()
        self._thread.join(timeout_s)


def sealer_of(journals: Path, log_url: str) -> Background:
    """Seals journals."""
    return Background(
        "sealing",
        ["serving.log.seal_process", str(journals), log_url],
        every_s=120.0,
        kept="the journals are kept",
        is_urgent=lambda: unsealed(journals) > _MANY_JOURNALS,
    )


def sender_of(folder: Path, captures: CaptureConfig) -> Background | None:
    """Sends kept images to where they are kept; None where that is the server's own folder."""
    if not captures.url:
        return None
    looked = time.monotonic()

    def is_due() -> bool:
        nonlocal looked
        # Erasures elsewhere, and what grew old there, have time.
        if bytes_in(folder) or time.monotonic() - looked > _LOOK_THERE_S:
            looked = time.monotonic()
            return True
        return False

    return Background(
        "sending of kept images",
        ["serving.log.send_process", str(folder), captures.url, str(captures.retain_days)],
        every_s=30.0,
        kept="the images wait here",
        is_due=is_due,
        is_urgent=lambda: bytes_in(folder) > captures.max_waiting_bytes // 2,
    )
