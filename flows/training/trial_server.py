"""The server of production with one release, for as long as it is asked: `visionloop serve` in a process, on loopback.

Its workspace is a folder that is thrown away, with a store of releases and routes of its own, so it reads and writes nothing
of what is in production. It listens on free ports, and ends with whoever started it, also when that is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from components.contracts.errors import EngineUnavailable
from components.contracts.records import Stored
from components.contracts.releases import Release, Route, Routes
from components.dvc_repository import STATE
from components.releases import ReleaseStore
from flows.workspace.settings import environment_with

VERSION = "trial"
"""What the release goes by: it has no version before it is registered."""
_PROGRAM = """
import runpy, sys
from components.lifetime import end_with
end_with(int(sys.argv.pop(1)))
runpy.run_module("flows", run_name="__main__", alter_sys=True)
"""
"""The command line of visionloop, which ends with its parent: a run that is killed must leave no server behind."""
_OF_THE_MACHINE = ("cannot listen on", "no space left", "Cannot allocate memory", "MemoryError", "bad_alloc")
"""What a server says of the machine and not of its release."""
_LAST_LINES = 3
_MOST_PATIENCE = 9.0
"""On a machine whose processors are taken, the time is stretched by as many times itself at most."""


class DoesNotServe(Exception):
    """The server did not do what it is there for; the message says what was asked of it and what came back."""

    def __init__(self, message: str, *, timed_out: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out


@dataclass(frozen=True)
class TrialServer:
    """A server that is ready."""

    port: int
    grpc_port: int
    ready_after_s: float
    running: _Running

    def left_s(self, asking: str) -> float:
        """The seconds that are left for a question; raises DoesNotServe when there are none."""
        left = self.running.left_s()
        if left <= 0:
            raise DoesNotServe(f"{asking}: no answer within {self.running.limit_s:.0f} s", timed_out=True)
        return left


class _Running:
    """A server's process, what it starts, and what it may take in all.

    Its time stands still while it waits for a processor: that blames no release.
    """

    def __init__(self, process: subprocess.Popen[bytes], began: float, limit_s: float) -> None:
        self.process, self.began, self.limit_s = process, began, limit_s
        self._seen: set[psutil.Process] = set()

    def left_s(self) -> float:
        return self.began + self.limit_s + min(self.waited_s(), _MOST_PATIENCE * self.limit_s) - time.monotonic()

    def waited_s(self) -> float:
        """How long the server and its engine could have run and had no processor; 0 where the system does not say."""
        waited = 0
        for pid in (self.process.pid, *(child.pid for child in self._children())):
            with contextlib.suppress(OSError, ValueError, IndexError):
                waited += int(Path(f"/proc/{pid}/schedstat").read_text().split()[1])
        return waited / 1e9

    def _children(self) -> set[psutil.Process]:
        """What it started so far: those of a server that has ended are nobody's children any more."""
        if self.process.poll() is None:  # else its number may be another process's by now
            with contextlib.suppress(psutil.Error):
                self._seen |= set(psutil.Process(self.process.pid).children(recursive=True))
        return self._seen

    def end(self) -> None:
        """End the server and what it started, at once: nothing of what it holds is kept."""
        self.process.send_signal(signal.SIGSTOP)  # it starts nothing more while its children are listed
        family = self._children()
        self.process.kill()
        for child in family:
            with contextlib.suppress(psutil.Error):
                child.kill()
        self.process.wait()
        psutil.wait_procs(family, timeout=10)


@contextlib.contextmanager
def trial_server(
    release: Stored[Release], *, folder: Path, log: Path, plugins: Path | None, limit_s: float
) -> Iterator[TrialServer]:
    """A server in the new `folder`, which writes to `log`, ready; ended with all that it started when the context ends.

    Raises DoesNotServe, also of the questions asked inside, with the server's last lines; EngineUnavailable where this
    machine is at fault: what it says then is nothing about the release.
    """
    began, kills = time.monotonic(), _kills_for_memory()
    place = folder / STATE
    place.mkdir(parents=True)
    store = ReleaseStore(str(place / "releases"))
    route = Route(release=store.publish(release), version=VERSION, role="champion", weight=1.0)
    store.move(Routes(model=release.record.model, generation=1, routes=(route,)))
    if plugins is not None:
        (folder / "plugins").symlink_to(plugins)
    try:
        process = _start(release.record.model, folder, log, releases=store.url)
    except (OSError, MemoryError) as error:
        raise EngineUnavailable(
            f"the server that tries the release could not be started on this machine: {error}"
        ) from error
    running = _Running(process, began, limit_s)
    try:
        yield _ready(running, log)
    except DoesNotServe as error:
        lines = placeless(log.read_text(errors="replace"), folder).splitlines()
        told = " | ".join(line.strip()[:300] for line in lines[-_LAST_LINES:]) or "(none)"
        if fault := _fault(running, log, kills, timed_out=error.timed_out):
            raise EngineUnavailable(
                f"this machine could not try the release in a server: {fault}. That says nothing of the release; free what "
                f"is short and run the same command again. The server's last lines: {told}"
            ) from error
        message = f"{placeless(str(error), folder)}; the server's last lines: {told}"
        raise DoesNotServe(message, timed_out=error.timed_out) from error
    finally:
        running.end()


def _start(model: str, folder: Path, log: Path, *, releases: str) -> subprocess.Popen[bytes]:
    ports = ["--port", "0", "--grpc-port", "0"]
    asked = ["serve", "--model", model, *ports, "--workspace", str(folder)]
    own = {
        "VISIONLOOP_RELEASES": releases,
        "VISIONLOOP_PREDICTIONS": str(folder / STATE / "predictions"),
        "VISIONLOOP_CAPTURES": "",  # its own folder
    }
    with log.open("wb") as stream:
        return subprocess.Popen(
            # -P: what lies in the folder that it is started in is not what is imported.
            [sys.executable, "-P", "-c", _PROGRAM, str(os.getpid()), *asked],
            cwd=folder,
            env=environment_with(own),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            process_group=0,  # Ctrl-C is the run's to answer
        )


def _ready(running: _Running, log: Path) -> TrialServer:
    """Wait until the server says that it is ready, that it does not take the release, or ends."""
    while True:
        ended = running.process.poll() is not None  # before the log is read: its last lines count
        for event in _events(log):
            if event.get("event") == "ready":
                return TrialServer(event["port"], event["grpc_port"], time.monotonic() - running.began, running)
            if event.get("event") == "routes are not followed":
                raise DoesNotServe(f"the server did not take the release: {event.get('problem')}")
        if ended:
            raise DoesNotServe(f"the server ended with status {running.process.returncode} before it was ready")
        if running.left_s() <= 0:
            raise DoesNotServe(f"the server was not ready within {running.limit_s:.0f} s", timed_out=True)
        time.sleep(0.02)


def _events(log: Path) -> list[dict[str, Any]]:
    """The whole lines of the structured log so far."""
    found = []
    for line in log.read_bytes().split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            told = json.loads(line)
            if isinstance(told, dict):
                found.append(told)
    return found


def placeless(text: str, folder: Path) -> str:
    """What a server said, without the place where it ran, which is gone."""
    return text.replace(f"{folder}/", "").replace(str(folder), folder.name)


def _fault(running: _Running, log: Path, kills: int, *, timed_out: bool) -> str:
    """What of this machine kept the server from answering; empty where it was not the machine."""
    if running.process.poll() == -9:
        return "the server was killed, perhaps for want of memory"
    if _kills_for_memory() > kills:
        return "its memory was used up, and the system killed a process"
    if timed_out and (waited := running.waited_s()) > _MOST_PATIENCE * running.limit_s:
        return f"other programs took its processors, for which the server waited {waited:.0f} s"
    told = log.read_text(errors="replace")
    return next((f"the server says {words!r}" for words in _OF_THE_MACHINE if words in told), "")


def _kills_for_memory() -> int:
    """How many processes the system has killed for want of memory; always 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        counted = Path("/proc/vmstat").read_text().splitlines()
        return int(next(line.split()[1] for line in counted if line.startswith("oom_kill ")))
    return 0
