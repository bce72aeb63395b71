"""A release that is loading leaves the processors to the one that is served, and never outlives its server."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from served import MODEL, Server, png, publish, route, server, variant
from shapes import KINDS

from components.contracts.errors import ConfigError, PluginFailed
from components.contracts.families import OutputField
from components.contracts.records import Stored
from components.contracts.releases import Release
from components.formats import Accepted
from components.releases import ReleaseStore
from components.tasks.classification import Task
from serving.engines.deployment import Deployment, ReleaseRefused
from serving.engines.frames import Facts, Form, Outcome, Refusal, Splitter, encode_answer
from serving.engines.limits import Job, Limits, Margin
from serving.engines.worker import Loaded, Order
from serving.engines.yielding import Yielding
from serving.log.background import sealer_of
from serving.metrics import Metrics
from serving.routing import Following, Routed

CODE = Path(__file__).resolve().parents[2]


class Served:
    """A deployment as the yielding sees it."""

    def __init__(self) -> None:
        self.behind = False
        self.patient = 0

    def be_patient(self) -> None:
        self.patient += 1


def test_a_loading_process_stands_still_while_pictures_wait_and_goes_on_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.engines.yielding._YIELD_S", 0.1)
    served: Any = Served()
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])

    async def states(count: int) -> list[str]:
        found = []
        for _ in range(count):
            await asyncio.sleep(0.007)
            found.append(psutil.Process(process.pid).status())
        return found

    async def act() -> tuple[list[str], float, int, list[str], float, list[str]]:
        yielding = Yielding(process, [Served(), served])
        served.behind = True
        await asyncio.sleep(0.05)  # it stands still for the first time
        before, patient = _cpu_s(process), served.patient
        busy = await states(140)
        went_on, patient = _cpu_s(process) - before, served.patient - patient
        served.behind = False
        await asyncio.sleep(0.1)
        idle = await states(30)
        stood_still_s = yielding.stood_still_s
        served.behind = True
        await asyncio.sleep(0.05)
        yielding.end()
        return busy, went_on, patient, idle, stood_still_s, await states(30)

    try:
        busy, went_on, patient, idle, stood_still_s, ended = asyncio.run(act())
    finally:
        process.kill()
        process.wait()
    assert busy.count(psutil.STATUS_STOPPED) >= 90  # it stands still most of the time
    assert went_on >= 0.03  # and also then it goes on a little
    assert psutil.STATUS_STOPPED not in idle
    assert 0.5 < stood_still_s < 2.0
    assert psutil.STATUS_STOPPED not in ended
    assert patient >= 30  # about a hundred: also while it stands still, not only between


def _cpu_s(process: subprocess.Popen[bytes]) -> float:
    return float(psutil.Process(process.pid).cpu_times().user)


def test_a_loading_process_stands_still_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.engines.yielding._YIELD_S", 0.1)
    monkeypatch.setattr("serving.engines.yielding._MOST_STILL_S", 0.3)
    served: Any = Served()
    served.behind = True
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])

    async def act() -> tuple[float, str, list[int]]:
        yielding = Yielding(process, [served])
        await asyncio.sleep(1.5)
        found, patient = yielding.stood_still_s, [served.patient]
        await asyncio.sleep(0.2)
        patient.append(served.patient)
        status = psutil.Process(process.pid).status()
        yielding.end()
        await asyncio.sleep(0)
        patient.append(served.patient)
        await asyncio.sleep(0.2)
        return found, status, [*patient, served.patient]

    try:
        stood_still_s, status, patient = asyncio.run(act())
    finally:
        process.kill()
        process.wait()
    assert 0.3 <= stood_still_s < 0.6
    assert status != psutil.STATUS_STOPPED
    assert patient[1] - patient[0] >= 3  # and what is served is patient for as long as it loads
    assert patient[3] == patient[2]


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
    monkeypatch.setattr("serving.engines.yielding._LOAD_S", 0.001)
    monkeypatch.setattr("serving.engines.yielding._YIELD_S", 5.0)
    assert asyncio.run(act())


def test_a_release_comes_up_though_pictures_never_stop_waiting(
    smoke: Stored[Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.engines.yielding._LOAD_S", 0.001)
    monkeypatch.setattr("serving.engines.yielding._YIELD_S", 0.5)
    monkeypatch.setattr("serving.engines.yielding._MOST_STILL_S", 3.0)
    served: Any = Served()
    served.behind = True

    async def act() -> tuple[bool, float]:
        made = Deployment(smoke, version="2", generation=2, limits=Limits(), metrics=Metrics(), plugins=None)
        since = time.monotonic()
        try:
            await made.start(beside=[served])
            return made.ready, time.monotonic() - since
        finally:
            await made.close()

    ready, took_s = asyncio.run(act())
    assert ready
    assert took_s >= 3.0  # all that it may be made to stand still, it was


def test_an_engine_that_dies_as_it_says_it_is_ready_does_not_serve(
    smoke: Stored[Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    receive = Deployment._received

    def die(self: Deployment, link: Any, kind: Any, payload: bytes) -> None:
        receive(self, link, kind, payload)
        link.process.kill()
        link.transport.abort()

    monkeypatch.setattr(Deployment, "_received", die)

    async def act() -> bool:
        made = Deployment(smoke, version="2", generation=2, limits=Limits(), metrics=Metrics(), plugins=None)
        try:
            with pytest.raises(ReleaseRefused, match="died as soon as it was ready"):
                await made.start()
            return made.ready
        finally:
            await made.close()

    assert asyncio.run(act()) is False


def test_a_release_loads_beside_all_that_is_served_and_is_patient_when_it_takes_over(
    stage: Path, smoke: Stored[Release], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded_beside: list[Any] = []

    async def start(_: Deployment, *, beside: Any = ()) -> None:
        loaded_beside.append(beside)

    monkeypatch.setattr(Deployment, "start", start)
    neighbour: Any = Served()
    store = ReleaseStore(str(stage / ".visionloop" / "releases"))

    async def act() -> list[float]:
        routed = Routed(
            MODEL,
            store=store,
            state=tmp_path,
            limits=Limits(),
            following=Following(),
            metrics=Metrics(),
            plugins=None,
            served=lambda: [neighbour],
        )
        now = asyncio.get_running_loop().time()
        await routed.refresh()
        assert routed.current._patient_until == -math.inf  # a start is no change
        margin = routed.current._margin
        publish(store, variant(smoke, tmp_path / "next", threshold=0.93), 2, "2")
        await routed.refresh()
        assert routed.current.version == "2"
        assert routed.current._margin is margin  # the machine is the same
        patient = [routed.current._patient_until - now]
        monkeypatch.setattr(Deployment, "ready", True)
        route(store, smoke.record.digest(), 3, "1")  # back to the one before, which is warm
        assert routed._standby is not None
        routed._standby._patient_until = -math.inf
        await routed.refresh()
        assert routed.current.version == "1"
        patient.append(routed.current._patient_until - now)
        assert routed.current._margin is margin
        await routed.close(drain_s=1)
        return patient

    assert min(asyncio.run(act())) >= 5.0
    assert loaded_beside == [[neighbour], [neighbour]]


def test_what_serves_is_remembered_before_it_answers(
    stage: Path, smoke: Stored[Release], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is killed as soon as it is ready starts again with what it served."""
    remember, answering = Routed._remember, []

    async def start(_: Deployment, *, beside: Any = ()) -> None:
        pass

    def look(self: Routed, routes: Any) -> None:
        answering.append(self.deployment.version if self.deployment else "nothing")
        remember(self, routes)

    monkeypatch.setattr(Deployment, "start", start)
    monkeypatch.setattr(Routed, "_remember", look)
    store = ReleaseStore(str(stage / ".visionloop" / "releases"))
    places: dict[str, Any] = {"store": store, "state": tmp_path / "state", "plugins": None, "served": list}

    async def act() -> None:
        routed = Routed(MODEL, limits=Limits(), following=Following(), metrics=Metrics(), **places)
        await routed.refresh()
        publish(store, variant(smoke, tmp_path / "next", threshold=0.94), 2, "2")
        await routed.refresh()
        assert routed.current.version == "2"
        await routed.close(drain_s=1)

    asyncio.run(act())
    assert answering == ["nothing", "1"]


def test_sealing_gives_way_and_takes_a_share_only_when_it_has_fallen_behind_or_the_server_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    failures: list[int] = []
    done = threading.Event()

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        calls.append(command[-1])
        done.set()
        if failures:
            failures.pop()
            raise OSError(errno.EAGAIN, "no process for now")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("serving.log.background.subprocess.run", run)
    sealer = sealer_of(tmp_path, "log")

    def sealed() -> str:
        done.clear()
        sealer.wake()
        assert done.wait(10)
        return calls[-1]

    try:
        for number in range(4):
            (tmp_path / f"{number}.journal").touch()
        failures.append(1)
        assert sealed() == "idle"  # no process could be made
        assert sealed() == "idle"  # the next time it could
        (tmp_path / "4.journal").touch()
        assert sealed() == "low"
        (tmp_path / "4.journal").unlink()
        assert sealed() == "idle"
    finally:
        sealer.close(10)
    assert calls[-1] == "low"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other kernels have no idle class")
def test_sealing_is_of_the_idle_class_when_it_gives_way() -> None:
    code = (
        "import os, sys; from serving.log.seal_process import step_back; step_back(sys.argv[1]);"
        "print(os.sched_getscheduler(0) == os.SCHED_IDLE, os.nice(0))"
    )
    told = [subprocess.check_output([sys.executable, "-c", code, how], cwd=CODE, text=True) for how in ("idle", "low")]
    assert told == ["True 19\n", "False 19\n"]


def test_what_answers_and_refuses_comes_before_the_lanes_and_is_not_held_up_by_collections(running: Server) -> None:
    """What is there before the first release is loaded is looked at by no collection."""
    own = psutil.Process(running.process.pid).nice()
    assert [psutil.Process(pid).nice() for pid in running.engine_processes()] == [min(19, own + Limits().niceness)]
    running.wait_for(lambda: any('"event": "ready"' in line for line in running.told))
    (ready,) = [json.loads(line) for line in running.told if line.startswith("{") and '"event": "ready"' in line]
    assert ready["frozen_objects"] > 10_000


def test_a_change_of_releases_makes_late_what_would_else_be_refused(smoke: Stored[Release]) -> None:
    """The bound on waiting is four times the usual while releases change, comes back little by little, and there is one all the same."""

    async def act() -> list[tuple[bool, bool, bool, bool]]:
        made = Deployment(smoke, version="1", generation=1, limits=Limits(), metrics=Metrics(), plugins=None)
        made._flying = {0: (0.0, [None] * 5), 1: (0.0, [None] * 5)}  # type: ignore[list-item]
        found = []
        for picture_ms in (20.0, 50.0, 190.0, 210.0):  # 10 pictures: 0.2, 0.5, 1.9 and 2.1 s
            made._picture_ms, made._patient_until = picture_ms, -math.inf
            usual = made.full
            made.be_patient()
            changing = made.full
            made._patient_until -= 3.0  # two fifths of the way are left: 1.0 s
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


@pytest.mark.parametrize(("noise", "least", "most"), [(0.02, 0.79, 0.81), (0.15, 0.6, 0.7), (1.0, 0.4, 0.42)])
def test_the_margin_is_what_the_machine_needs(noise: float, least: float, most: float) -> None:
    """Waits that miss the expectation by a log-normal factor: 99 % end inside the bound, and no more is given away for it."""
    rng = np.random.default_rng(7)
    margin = Margin()
    shares, waits = [], []
    for factor in np.exp(noise * rng.standard_normal(40_000)):
        shares.append(margin.share)
        waits.append(margin.share * factor)
        margin.learn(waits[-1], work_s=0.01)
    settled = slice(20_000, None)
    assert least <= np.mean(shares[settled]) <= most
    assert np.mean(np.array(waits[settled]) <= 1) >= 0.99 or noise == 1.0  # it gives no more than it has


def test_the_margin_learns_only_from_what_had_to_wait_as_usual(smoke: Stored[Release]) -> None:
    async def act() -> list[float]:
        loop = asyncio.get_running_loop()
        found = []
        for waited_s, what in (
            (0.0, ""),
            (0.4, ""),
            (0.9, ""),
            (0.9, "changing"),
            (0.9, "one of many"),
            (0.9, "new process"),
        ):
            made = Deployment(smoke, version="1", generation=1, limits=Limits(), metrics=Metrics(), plugins=None)
            made._link = link = object()  # type: ignore[assignment]
            made._picture_ms = 10.0
            if what == "changing":
                made.be_patient()
            if what == "new process":
                made._up_since = loop.time() - 0.5
            queued_at, lone = loop.time() - waited_s, what != "one of many"
            job = Job(Form.ENCODED, b"", queued_at, math.inf, loop.create_future(), lone=lone)
            made._flying[1] = (0.0, [job])
            answer = encode_answer(1, [Refusal(Outcome.UNDECODABLE, "damaged")], decode_ms=10.0, infer_ms=10.0)
            for kind, payload in Splitter().feed(answer):
                made._received(link, kind, payload)  # type: ignore[arg-type]
            assert job.future.done()
            found.append(made._margin.share - Margin().share)
        return found

    at_once, in_time, late, *excused = asyncio.run(act())
    assert late < 0 < in_time
    assert late == pytest.approx(-199 * in_time)
    assert [at_once, *excused] == [0, 0, 0, 0]


def test_the_cost_of_a_picture_is_that_of_a_busy_machine(smoke: Stored[Release]) -> None:
    """Measured before the first request, and learnt from answers alone while every lane is at work."""
    engine = smoke.record.engine
    probabilities = np.full(len(engine.classes), 1 / len(engine.classes), dtype=np.float32)
    facts = Facts("0" * 64, 16, 16, 99, (0.5, 0.5, 0.5, 0.5), probabilities, bytes(2 * engine.embedding_dim))
    refusal = Refusal(Outcome.UNDECODABLE, "damaged")

    async def act() -> list[float]:
        made = Deployment(smoke, version="1", generation=1, limits=Limits(), metrics=Metrics(), plugins=None)
        await made.start()
        try:
            assert made._link is not None
            found = [made._picture_ms]
            for result, others in ((facts, 0), (refusal, 1), (facts, 1)):
                answer = encode_answer(9, [result], decode_ms=100.0, infer_ms=100.0)
                job = Job(Form.ENCODED, b"", 0.0, math.inf, asyncio.get_running_loop().create_future())
                made._flying = {9: (0.0, [job]), **{number: (0.0, []) for number in range(others)}}
                ((kind, payload),) = Splitter().feed(answer)
                made._received(made._link, kind, payload)
                made._flying.clear()
                found.append(made._picture_ms)
            return found
        finally:
            await made.close()

    measured, alone, refused, busy = asyncio.run(act())
    assert 0 < measured < 100
    assert alone == refused == measured
    assert busy == pytest.approx(measured + 0.1 * (100 - measured))


def test_nothing_is_refused_while_a_lane_is_free(smoke: Stored[Release]) -> None:
    """Whatever was learnt: else a stall could teach a cost that refuses all that would teach another."""

    async def act() -> list[bool]:
        made = Deployment(smoke, version="1", generation=1, limits=Limits(), metrics=Metrics(), plugins=None)
        made._picture_ms = 60_000.0
        found = []
        for number in range(3):
            found.append(made.full)
            made._flying[number] = (0.0, [None])  # type: ignore[list-item]
        return found

    assert asyncio.run(act()) == [False, False, True]


def test_whoever_waits_longer_than_promised_is_told_so_suspects_too(smoke: Stored[Release]) -> None:
    """While an engine that died does not come back, nobody waits for it longer than any other."""

    async def act() -> list[str]:
        made = Deployment(smoke, version="1", generation=1, limits=Limits(), metrics=Metrics(), plugins=None)
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Any]] = []
        for jobs in (made._waiting, made._suspects):
            for late_s in (-1.0, 60.0):
                futures.append(loop.create_future())
                jobs.append(Job(Form.ENCODED, b"", loop.time(), loop.time() + late_s, futures[-1]))
        watching = loop.create_task(made._watch())
        await asyncio.wait(futures, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        watching.cancel()
        left = [len(made._waiting), len(made._suspects)]
        assert left == [1, 1]
        return [type(future.exception()).__name__ if future.done() else "waits" for future in futures]

    assert asyncio.run(act()) == ["NotServing", "waits", "NotServing", "waits"]


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
def test_an_engine_that_hears_of_nothing_ends_with_its_server() -> None:
    code = """
import os, signal, subprocess, sys, time
theirs = int(sys.argv[1])
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
command = [sys.executable, "-m", "serving.engines.process", str(theirs), str(os.getpid()), "0"]
print(subprocess.Popen(command, pass_fds=[theirs], process_group=0).pid, flush=True)
time.sleep(60)
"""
    ours, theirs = socket.socketpair()  # our end stays open: the engine never reads that nobody is there
    with ours, theirs:
        command = [sys.executable, "-c", code, str(theirs.fileno())]
        parent = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=CODE, stdout=subprocess.PIPE, text=True)
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        deadline = time.monotonic() + 30
        while not _ignores(child.pid, signal.SIGTTOU):  # what it does once it is bound to its server
            assert time.monotonic() < deadline
            time.sleep(0.02)
        parent.kill()
        parent.wait()
        parent.stdout.close()
        deadline = time.monotonic() + 10
        with contextlib.suppress(psutil.NoSuchProcess):
            while child.status() != psutil.STATUS_ZOMBIE:
                if time.monotonic() > deadline:
                    child.kill()
                    pytest.fail("the engine outlived its server")
                time.sleep(0.05)


def _ignores(pid: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line for line in status.splitlines() if line.startswith("SigIgn:")).split()[1]
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel ends a child with its parent on Linux alone")
def test_an_engine_whose_server_is_gone_already_does_not_begin() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-m", "serving.engines.process", str(theirs.fileno()), str(os.getppid()), "0"]
        done = subprocess.run(command, pass_fds=[theirs.fileno()], cwd=CODE, timeout=30, check=False)
    assert done.returncode == 1


def test_a_release_comes_up_under_full_load(stage: Path, smoke: Stored[Release], tmp_path: Path) -> None:
    """With the queue never empty the next release takes over all the same."""
    store = ReleaseStore(str(stage / ".visionloop" / "releases"))
    stop = threading.Event()
    statuses: list[int] = []

    with server(stage, "--max-wait-ms", "2000") as mine:

        def ask(number: int) -> None:
            index = 0
            while not stop.is_set():
                try:
                    statuses.append(mine.predict(png(KINDS[index % 3], 1000 * number + index % 50)).status)
                except OSError:
                    statuses.append(0)
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


def test_why_an_engine_fails_is_in_the_servers_log_once(
    smoke: Stored[Release], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    why = "target 'mine' raised in predict: /w/plugins/targets/mine.py:9: ValueError: no; correct it there"

    def fail(_: object) -> None:
        raise PluginFailed(why)

    loaded = Loaded(Order(smoke.folder, plugins=None, lanes=1, max_batch=2, accepted=Accepted()))
    monkeypatch.setattr(loaded._loaded, "predict", fail)
    for _ in range(2):
        (refusal,), *_rest = loaded.answer([(Form.ENCODED, png(KINDS[0], 1))])
        assert refusal == Refusal(Outcome.FAILED, "the engine failed; the server's log says why")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line) == {"level": "error", "event": "the engine failed", "problem": why}


def test_a_task_s_output_has_a_name_of_its_own(smoke: Stored[Release], monkeypatch: pytest.MonkeyPatch) -> None:
    class Loud(Task):
        def outputs(self, classes: Sequence[str]) -> tuple[OutputField, ...]:
            return (OutputField("label", "FP32", (), lambda probabilities: probabilities[:, 0]),)

    monkeypatch.setattr("serving.engines.deployment.load", lambda *_: Loud())
    made = Deployment(smoke, version="1", generation=1, limits=Limits(), metrics=Metrics(), plugins=None)
    with pytest.raises(ConfigError, match="has an output 'label', which is in every answer already"):
        asyncio.run(made.start())
