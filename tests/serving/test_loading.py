"""A release that is loading leaves the processors to the one that is served, and never outlives its server."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from served import MODEL, png, publish, server, variant
from shapes import KINDS

from components.contracts import Release, Stored
from components.releases import ReleaseStore
from serving.deployment import _yield_to

CODE = Path(__file__).resolve().parents[2]


class Served:
    """A deployment as the yielding sees it."""

    def __init__(self) -> None:
        self.wait = 0.0

    def expected_wait_s(self) -> float:
        return self.wait


def test_a_loading_process_stands_still_while_pictures_wait_and_goes_on_after() -> None:
    served: Any = Served()
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])

    async def states(count: int) -> list[str]:
        found = []
        for _ in range(count):
            await asyncio.sleep(0.007)
            found.append(psutil.Process(process.pid).status())
        return found

    async def act() -> tuple[list[str], list[str]]:
        task = asyncio.create_task(_yield_to(served, process))
        served.wait = 1.0
        busy = await states(60)
        served.wait = 0.0
        await asyncio.sleep(0.1)
        idle = await states(30)
        task.cancel()
        return busy, idle

    try:
        busy, idle = asyncio.run(act())
    finally:
        process.kill()
        process.wait()
    stopped = busy.count(psutil.STATUS_STOPPED)
    assert 20 <= stopped < 60  # it stands still most of the time, and also then it goes on a little
    assert psutil.STATUS_STOPPED not in idle


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel ends a child with its parent on Linux alone")
def test_an_engine_that_stands_still_ends_with_its_server() -> None:
    code = """
import os, signal, socket, subprocess, sys, time
ours, theirs = socket.socketpair()
child = subprocess.Popen([sys.executable, "-m", "serving.worker", str(theirs.fileno())], pass_fds=[theirs.fileno()], start_new_session=True)
time.sleep(2)
os.kill(child.pid, signal.SIGSTOP)
print(child.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=CODE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert psutil.Process(child).status() == psutil.STATUS_STOPPED
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_release_comes_up_under_full_load(stage: Path, smoke: Stored[Release], tmp_path: Path) -> None:
    """Yielding is no starving: with the queue never empty the next release takes over all the same."""
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
