"""A release that is loading leaves the processors to the one that is served, and never outlives its server."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from served import MODEL, png, publish, server, variant
from shapes import KINDS

from components.contracts import Release, Stored
from components.releases import ReleaseStore
from serving.deployment import Deployment, Limits, _Yielding
from serving.metrics import Metrics

CODE = Path(__file__).resolve().parents[2]


class Served:
    """A deployment as the yielding sees it."""

    def __init__(self) -> None:
        self.behind = False
        self.patient = 0

    def be_patient(self) -> None:
        self.patient += 1


def test_a_loading_process_stands_still_while_pictures_wait_and_goes_on_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.deployment._YIELD_S", 0.1)
    served: Any = Served()
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])

    async def states(count: int) -> list[str]:
        found = []
        for _ in range(count):
            await asyncio.sleep(0.007)
            found.append(psutil.Process(process.pid).status())
        return found

    async def act() -> tuple[list[str], float, list[str], float, list[str]]:
        yielding = _Yielding(process, [Served(), served])  # type: ignore[list-item]
        served.behind = True
        await asyncio.sleep(0.05)  # it stands still for the first time
        before = _cpu_s(process)
        busy = await states(140)
        went_on = _cpu_s(process) - before
        served.behind = False
        await asyncio.sleep(0.1)
        idle = await states(30)
        stood_still_s = yielding.stood_still_s
        served.behind = True
        await asyncio.sleep(0.05)
        yielding.end()
        return busy, went_on, idle, stood_still_s, await states(30)

    try:
        busy, went_on, idle, stood_still_s, ended = asyncio.run(act())
    finally:
        process.kill()
        process.wait()
    assert busy.count(psutil.STATUS_STOPPED) >= 90  # it stands still most of the time
    assert went_on >= 0.03  # and also then it goes on a little
    assert psutil.STATUS_STOPPED not in idle
    assert 0.5 < stood_still_s < 2.0
    assert psutil.STATUS_STOPPED not in ended
    assert served.patient > 1


def _cpu_s(process: subprocess.Popen[bytes]) -> float:
    return float(psutil.Process(process.pid).cpu_times().user)


def test_a_loading_process_stands_still_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.deployment._YIELD_S", 0.1)
    monkeypatch.setattr("serving.deployment._MOST_STILL_S", 0.3)
    served: Any = Served()
    served.behind = True
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])

    async def act() -> tuple[float, int, str]:
        yielding = _Yielding(process, [served])
        await asyncio.sleep(1.5)
        found = yielding.stood_still_s, served.patient
        await asyncio.sleep(0.2)
        assert served.patient == found[1]
        return *found, psutil.Process(process.pid).status()

    try:
        stood_still_s, patient, status = asyncio.run(act())
    finally:
        process.kill()
        process.wait()
    assert 0.3 <= stood_still_s < 0.6
    assert patient >= 3
    assert status != psutil.STATUS_STOPPED


def test_the_time_that_a_release_stands_still_is_not_held_against_it(
    stage: Path, smoke: Stored[Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Served pictures wait for longer than loading may take; the release comes up when they are through."""
    served: Any = Served()
    served.behind = True

    async def act() -> bool:
        limits = replace(Limits(), load_timeout_s=6.0)
        made = Deployment(smoke, version="2", generation=2, limits=limits, metrics=Metrics(), plugins=None)
        starting = asyncio.create_task(made.start(beside=[served]))
        await asyncio.sleep(8)
        assert not starting.done()
        served.behind = False
        try:
            await starting
            return made.ready
        finally:
            await made.close()

    # It hardly goes on in between, so that it certainly is not up within its time.
    monkeypatch.setattr("serving.deployment._LOAD_S", 0.001)
    monkeypatch.setattr("serving.deployment._YIELD_S", 5.0)
    assert asyncio.run(act())


def test_a_change_of_releases_makes_late_what_would_else_be_refused(
    smoke: Stored[Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound on waiting is doubled while releases change, comes back little by little, and there is one all the same."""

    async def act() -> list[tuple[bool, bool, bool, bool]]:
        made = Deployment(smoke, version="1", generation=1, limits=Limits(), metrics=Metrics(), plugins=None)
        made._flying[0] = (0.0, [None] * 10)  # type: ignore[list-item]
        found = []
        for picture_ms in (30.0, 50.0, 90.0, 110.0):  # 10 pictures: 0.3, 0.5, 0.9 and 1.1 s
            made._picture_ms, made._patient_until = picture_ms, -math.inf
            usual = made.full
            made.be_patient()
            changing = made.full
            made._patient_until -= 3.0
            settling = made.full
            made._patient_until -= 3.0
            found.append((usual, changing, settling, made.full))
        return found

    assert asyncio.run(act()) == [
        (False, False, False, False),
        (True, False, False, True),
        (True, False, True, True),
        (True, True, True, True),
    ]


def test_only_an_engine_that_works_can_be_behind(smoke: Stored[Release]) -> None:
    async def act() -> list[bool]:
        made = Deployment(smoke, version="1", generation=1, limits=Limits(), metrics=Metrics(), plugins=None)
        found: list[bool] = []
        for count, picture_ms in ((1, 60.0), (10, 60.0), (4, 5.0), (10, 5.0)):
            made._flying[0] = (0.0, [None] * count)  # type: ignore[list-item]
            made._picture_ms = picture_ms
            made._link = None
            found.append(made.behind)
            made._link = object()  # type: ignore[assignment]
            found.append(made.behind)
        return found

    # Each first without an engine. One slow picture at a time leaves a processor idle; ten wait for one.
    assert asyncio.run(act()) == [False, False, False, True, False, False, False, True]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel ends a child with its parent on Linux alone")
def test_an_engine_that_stands_still_ends_with_its_server() -> None:
    code = """
import os, signal, socket, subprocess, sys, time
ours, theirs = socket.socketpair()
command = [sys.executable, "-m", "serving.engine", str(theirs.fileno()), str(os.getpid())]
child = subprocess.Popen(command, pass_fds=[theirs.fileno()], process_group=0)
time.sleep(2)
os.kill(child.pid, signal.SIGSTOP)
print(child.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=CODE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    deadline = time.monotonic() + 10
    while psutil.Process(child).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_release_comes_up_under_full_load(stage: Path, smoke: Stored[Release], tmp_path: Path) -> None:
    """With the queue never empty the next release takes over all the same."""
    import threading

    store = ReleaseStore(str(stage / ".visionloop" / "releases"))
    stop = threading.Event()
    statuses: list[int] = []

    with server(stage, "--max-wait-ms", "2000") as mine:

        def ask(number: int) -> None:
            index = 0
            while not stop.is_set():
                statuses.append(mine.predict(png(KINDS[index % 3], 1000 * number + index % 50)).status)
                index += 1

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
        for thread in threads:
            thread.start()
        try:
            publish(store, variant(smoke, tmp_path / "next", threshold=0.93), 2, "2")
            mine.wait_for(lambda: mine.version == "2", 60)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert mine.status()["models"][MODEL]["problem"] is None
    assert set(statuses) == {200}
