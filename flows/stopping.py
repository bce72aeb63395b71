"""Ctrl-C, SIGTERM and SIGHUP: one line that says where it stopped, no process left, exit status 130, 143 or 129.

A thread of its own hears the signal from the C level, so neither a library that replaces Python's handlers (Prefect), nor
native code, nor a pool that waits for its threads can delay it. What is killed is taken up again by the same command: the
store, the ledger and the registry are made for a kill at any moment.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SPOKEN: dict[int, str] = {signal.SIGINT: "Ctrl-C"}
_GRACE_S = 3.0
"""What a command may take to put away what it holds. A run of the stages needs none."""


class Stopped(KeyboardInterrupt):
    """Raised in the main thread of a command that is asked to stop; ends it as Ctrl-C ends any program."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class _Ending:
    """How this process ends when it is asked to."""

    told: Callable[[], str] | None = None
    """What is said of a run of the stages, which may end at any moment; else the command unwinds."""
    last: Callable[[str], None] = lambda _: None
    as_json: bool = False
    starting: bool = False
    """While libraries are imported for a command: nothing is held yet, so nothing has to unwind."""
    unwinding: bool = False


_ending = _Ending()
_once = threading.Lock()


@contextlib.contextmanager
def at_once(told: Callable[[], str], last: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """While this lasts, a signal ends the process without unwinding it: everything in it survives a kill.

    `last` hears what was said, when nothing of this process runs any more; it has to be quick.
    """
    _ending.told, _ending.last = told, last
    try:
        yield
    except Exception:
        _ending.told = None
        raise
    # Not for other exceptions: they end the process, and Prefect's handler of the same signal may raise one first.
    _ending.told = None


def watch(*, as_json: bool = False, starting: bool = False) -> None:
    """Take over the signals of this process, except those that it was started to ignore (nohup, `&` in a script).

    With `as_json`, what is said is one JSON object on standard output as well. With `starting`, a signal ends the process
    at once until `started` is called.
    """
    _ending.as_json, _ending.starting = as_json, starting
    heard, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    signal.signal(signal.SIGURG, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(heard,), daemon=True, name="stopping").start()


def started() -> None:
    """From here on a command runs: a signal lets it put away what it holds."""
    _ending.starting = False


def end(number: int) -> NoReturn:
    """Say where it stopped, end what this process started, and end it."""
    with _once:  # two threads may come here; the second waits for the process to be gone
        text = (
            _ending.told()
            if _ending.told is not None
            else f"stopped by {_SPOKEN.get(number) or signal.Signals(number).name}"
        )
        if sys.stderr.isatty():
            os.write(2, b"\r\x1b[2K\x1b[?25h")  # a bar may be half drawn, with the cursor hidden
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode())
            if _ending.as_json:
                os.write(1, (json.dumps({"error": "Stopped", "message": text, "notes": []}) + "\n").encode())
        # What unwinds in other threads meanwhile has nothing to add, such as a framework's own word for Ctrl-C.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        if not _ending.starting:
            _kill_family()
        if _ending.told is not None:
            _ending.last(text)
        os._exit(128 + number)


def _interrupt(number: int, _: object) -> None:
    if _ending.told is None and not _ending.starting and not _ending.unwinding:
        _ending.unwinding = True
        raise Stopped(number)


def _listen(heard: int) -> None:
    number = _next(heard, None)
    if _ending.told is None and not _ending.starting:
        until = time.monotonic() + _GRACE_S
        while time.monotonic() < until:
            if not _ending.unwinding:
                # What came just before the main thread began to wait did not wake it.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGURG)
            if _next(heard, 0.2):
                break  # asked a second time
    end(number)


def _next(heard: int, timeout_s: float | None) -> int:
    """The next of our signals, others such as SIGCHLD aside; 0 when nothing more came in time."""
    while select.select([heard], [], [], timeout_s)[0]:
        number = os.read(heard, 1)[0]
        if number in _SIGNALS:
            return number
    return 0


def _kill_family() -> None:
    """End what this process started, but for what was given a session of its own: that is meant to outlive it."""
    import psutil

    session = os.getsid(0)
    family = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(OSError):
            if os.getsid(child.pid) == session:
                family.append(child)
    for child in family:
        with contextlib.suppress(psutil.Error):
            child.kill()
