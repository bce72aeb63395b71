"""From alarm to training through a real Prefect server: events, automations, the sweep, the governor. No worker here."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from unittest import mock

import psutil
import pytest
from looped import MODEL, loop_of, now, predict
from shapes import commit, visionloop, write_pictures

from components.contracts.errors import ConfigError, UnknownName
from flows.loop.alarms import DRIFT, announce, sweep, tell_of_data
from flows.loop.flow_runs import start, trail, training_runs
from flows.up.deployments import automate, deploy, make_pool
from flows.workspace import recipes
from flows.workspace.workspace import Workspace
from monitoring.governor import Request
from serving.engines.limits import Limits


@pytest.fixture(scope="module")
def deployed(champions: Path, tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Path:
    """A workspace with a champion whose deployments and automations are on the session's server."""
    root = Path(shutil.copytree(champions, tmp_path_factory.mktemp("deployed") / "workspace", symlinks=True))
    loop = loop_of(root)
    make_pool()
    deploy(loop)
    automate(loop)
    return root


def alarm(root: Path, name: str) -> str:
    """Raise an alarm through a watch of a window that drifted; its event is sent when a server is known."""
    since = now()
    predict(root, 120, shift=4, name=name)
    done = visionloop("watch", "--since", since, "--json", cwd=root)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    (identifier,) = found["alarms"]
    assert identifier in visionloop("alarms", cwd=root).stdout
    return str(identifier)


def new_data(root: Path, seed: int) -> None:
    write_pictures(root.parent / f"more-{seed}", 4, start=seed)
    done = visionloop("data", "add", str(root.parent / f"more-{seed}"), cwd=root)
    assert done.returncode == 0, done.stderr
    commit(root)


def train(root: Path, **parameters: Any) -> dict[str, Any]:
    from flows.train import train as flow

    call: Any = flow
    found: dict[str, Any] = call("smoke", str(root), quiet=True, **parameters)
    return found


def test_deploying_again_changes_nothing(deployed: Path) -> None:
    from prefect.automations import Automation
    from prefect.client.orchestration import get_client

    loop = loop_of(deployed)

    def state() -> tuple[Any, Any]:
        with get_client(sync_client=True) as client:
            names = {}
            for name in ("train", "watch", "promote"):
                found = client.read_deployment_by_name(f"{name}/{MODEL}")
                names[name] = (found.id, [(s.slug, s.active) for s in found.schedules], dict(found.parameters))
            automations = sorted((str(a.id), a.name) for a in client.read_automations() if a.name.startswith("visionloop:"))
        return names, automations

    before = state()
    make_pool()
    deploy(loop)
    automate(loop)
    assert state() == before
    assert [slug for slug, _ in before[0]["train"][1]] == ["nightly"]
    assert [slug for slug, _ in before[0]["watch"][1]] == ["every-window"]
    with get_client(sync_client=True) as client:
        (every,) = client.read_deployment_by_name(f"watch/{MODEL}").schedules
    schedule: Any = every.schedule
    assert schedule.anchor_date.timestamp() == 30  # as windows are counted, whatever their length
    assert len(before[1]) == 2
    # Made twice by somebody, it is made single again; one that a person switched off stays off.
    drift: Any = Automation.read(name=f"visionloop: drift retrains {MODEL}")
    drift.id = None
    drift.create()
    assert len(state()[1]) == 3
    automate(loop)
    assert len(state()[1]) == 2
    mine: Any = Automation.read(name=f"visionloop: drift retrains {MODEL}")
    mine.disable()
    automate(loop)
    again: Any = Automation.read(name=f"visionloop: drift retrains {MODEL}")
    assert not again.enabled
    again.enable()


def test_a_schedule_that_was_paused_stays_paused_and_one_that_the_loop_no_longer_has_goes(deployed: Path) -> None:
    from prefect.client.orchestration import get_client

    loop = loop_of(deployed)
    with get_client(sync_client=True) as client:

        def nightly() -> list[tuple[str | None, bool]]:
            return [(s.slug, s.active) for s in client.read_deployment_by_name(f"train/{MODEL}").schedules]

        found = client.read_deployment_by_name(f"train/{MODEL}")
        client.update_deployment_schedule(found.id, found.schedules[0].id, active=False)
        deploy(loop)
        assert nightly() == [("nightly", False)]
        loop.config = loop.config.model_copy(update={"nightly": None})
        deploy(loop)
        assert nightly() == []
        deploy(loop_of(deployed))
        assert nightly() == [("nightly", True)]


def test_an_event_makes_the_automation_start_the_training_deployment(deployed: Path) -> None:
    identifier = alarm(deployed, "event")
    assert loop_of(deployed).outbox.alarm(identifier).emissions == 1
    deadline = time.monotonic() + 60
    while not any(run["created_by"] for run in training_runs(loop_of(deployed), request=identifier)):
        assert time.monotonic() < deadline
        time.sleep(0.3)
    # The sweep may have been as fast: both ask the governor, which grants one.
    (run,) = [run for run in trail(loop_of(deployed), identifier, wait_s=20) if run["created_by"]]
    assert run["created_by"]["type"] == "AUTOMATION"
    assert run["automation"] == f"visionloop: drift retrains {MODEL}"
    assert (run["event"], run["event_alarm"]) == (DRIFT, identifier)
    assert run["cause"] == "drift"
    assert run["reason"].startswith("drift in window ")


def test_with_the_automation_off_the_outbox_alone_starts_exactly_one(deployed: Path) -> None:
    from prefect.automations import Automation

    drift: Any = Automation.read(name=f"visionloop: drift retrains {MODEL}")
    drift.disable()
    try:
        since = now()
        predict(deployed, 120, shift=4, name="off")
        # The watch that raises the alarm sweeps too; the alarm is old enough at once here.
        found = json.loads(visionloop("watch", "--since", since, "--json", cwd=deployed).stdout.strip().splitlines()[-1])
        (identifier,) = found["alarms"]
        for _ in range(3):
            sweep(loop_of(deployed), say=lambda _: None, grace_s=0)
        time.sleep(2)
        (run,) = trail(loop_of(deployed), identifier)
        assert (run["created_by"], run["automation"]) == (None, None)
        assert "visionloop-sweep" in run["tags"]
    finally:
        drift.enable()


def test_prefect_away_at_the_alarm_and_back_later(
    deployed: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: str
) -> None:
    import dataclasses

    loop = loop_of(deployed)
    since = datetime.datetime.fromisoformat(now())
    predict(deployed, 120, shift=4, name="away")
    from flows.loop.windows import Span, judge_window

    judged = judge_window(loop, Span(since, since + datetime.timedelta(minutes=5)), datetime.datetime.now(datetime.UTC))
    assert judged is not None
    assert judged.alarm is not None
    loop.settings = dataclasses.replace(loop.settings, prefect_api_url="")
    lines: list[str] = []
    announce(loop, judged.alarm, say=lines.append)
    assert sweep(loop, say=lines.append, grace_s=0) == []
    assert any("no Prefect server is known here: visionloop up" in line for line in lines)
    monkeypatch.setattr("flows.loop.alarms.start", lambda *_: (_ for _ in ()).throw(ConnectionError("nobody there")))
    loop.settings = dataclasses.replace(loop.settings, prefect_api_url="http://127.0.0.1:9/api")
    lines.clear()
    assert sweep(loop, say=lines.append, grace_s=0) == []
    assert lines == ["1 training not started by Prefect (ConnectionError: nobody there); the next sweep tries again"]
    monkeypatch.undo()
    started = next(s for s in sweep(loop_of(deployed), say=lines.append, grace_s=0) if s.key == judged.alarm.id)
    assert [run["flow_run"] for run in training_runs(loop, request=started.key)] == [started.flow_run_id]
    loop.settings = loop_of(deployed).settings
    assert start(loop, started.key) is None  # one is under way
    # It dies before it asked the governor, with its worker: the next sweep starts another one.
    from prefect.client.orchestration import get_client
    from prefect.states import Crashed

    with get_client(sync_client=True) as client:
        client.set_flow_run_state(started.flow_run_id, Crashed(), force=True)
    again = start(loop, started.key)
    assert again is not None
    assert again.flow_run_id != started.flow_run_id


def test_forged_and_foreign_alarms_start_nothing(deployed: Path) -> None:
    with pytest.raises(UnknownName, match="unknown alarm 'drift:shapes:forged'"):
        train(deployed, cause="drift", request="drift:shapes:forged")
    with pytest.raises(UnknownName, match="unknown alarm ''"):
        train(deployed, cause="drift")
    with pytest.raises(ConfigError, match="unknown cause 'whim'"):
        train(deployed, cause="whim")
    with pytest.raises(ConfigError, match="no scheduled run 'schedule:x' was ever asked for"):
        train(deployed, cause="schedule", request="schedule:x")


def test_the_loop_trains_when_there_are_new_data_and_only_then(
    root: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused without data, granted with, refused again as a duplicate; the schedule is skipped when nothing changed."""
    people: list[str] = []
    monkeypatch.setattr("flows.loop.permits.notify", lambda *given: people.append(given[3]["by"]))
    make_pool()
    deploy(loop_of(root))
    identifier = alarm(root, "data")
    refused = train(root, cause="drift", request=identifier)
    assert (refused["outcome"], refused["rule"]) == ("refused", "no new data")
    skipped = train(root, cause="schedule")
    assert (skipped["outcome"], skipped["rule"]) == ("refused", "nothing changed")
    new_data(root, 9000)
    loop = loop_of(root)
    assert tell_of_data(loop, say=lambda _: None) == [identifier]
    with mock.patch.object(recipes, "parse", wraps=recipes.parse) as parsing:
        done = train(root, cause="drift", request=identifier, reason="drift in a window")
    assert parsing.call_count == 1
    assert done["outcome"] in ("candidate", "undecided", "rejection"), done
    # Champion and candidate are two models, judged by the same images.
    (finding,) = (f for f in done["findings"] if (f["gate"], f["engine"]) == ("no_regression", "openvino-int8"))
    assert finding["status"] in ("pass", "fail", "inconclusive")
    assert "the champion's" in finding["message"]
    assert finding["n"] == done["data"]["splits"]["test"]
    (granted,) = loop.governor.runs(MODEL)
    # To the governor what was not decided is as good as what was rejected.
    came_of_it = "candidate" if done["outcome"] == "candidate" else "rejection"
    assert (granted.key, granted.state, granted.outcome) == (identifier, "finished", came_of_it)
    replayed = train(root, cause="drift", request=identifier)
    assert replayed["rule"] == "duplicate"
    assert tell_of_data(loop, say=lambda _: None) == []
    rules = [row["rule"] for row in loop.governor.history(MODEL)]
    assert rules == ["no new data", "nothing changed", "granted", "duplicate"]
    assert people == ["no new data"]  # nobody would act upon the others
    if done["outcome"] != "rejection":
        shown = visionloop("show", done["version"], cwd=root).stdout
        assert "Asked for: drift in a window." in shown


def test_a_refused_run_ends_as_skipped_and_says_why(deployed: Path) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import State

    from flows.train import train as flow

    call: Any = flow
    state: State[Any] = call("smoke", str(deployed), cause="schedule", quiet=True, return_state=True)
    assert (state.name, state.is_completed()) == ("Skipped", True)
    assert state.message is not None
    assert state.message.startswith("data, recipe and code are those of the latest run")
    with get_client(sync_client=True) as client:
        assert any(run.state_name == "Skipped" for run in client.read_flow_runs())


def test_a_workspace_that_is_busy_gives_the_grant_back(root: Path, prefect_server: str) -> None:
    from components.contracts.errors import WorkspaceBusy
    from flows.workspace.workspace import Workspace

    identifier = alarm(root, "busy")
    new_data(root, 9100)
    with Workspace.find(root).locked("somebody"), pytest.raises(WorkspaceBusy):
        train(root, cause="drift", request=identifier)
    loop = loop_of(root)
    assert loop.governor.due(MODEL) == [identifier]
    (run,) = loop.governor.runs(MODEL)
    assert run.state == "crashed"


def test_a_cancelled_training_is_not_taken_up_by_the_sweep(deployed: Path) -> None:
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelled

    loop = loop_of(deployed)
    since = datetime.datetime.fromisoformat(now())
    predict(deployed, 120, shift=4, name="cancelled")
    from flows.loop.windows import Span, judge_window

    judged = judge_window(loop, Span(since, since + datetime.timedelta(minutes=5)), datetime.datetime.now(datetime.UTC))
    assert judged is not None
    assert judged.alarm is not None
    key = judged.alarm.id
    started = start(loop, key)
    assert started is not None
    loop.governor.ask(Request(key, MODEL, "drift", "other", "d", seen_by="1", champion="1"), holder="h")
    loop.governor.give_back(key, "h")
    assert key in loop.governor.due(MODEL)
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(started.flow_run_id, Cancelled(), force=True)
    assert key not in [s.key for s in sweep(loop, say=lambda _: None, grace_s=0)]
    assert key not in loop.governor.due(MODEL)


def test_the_world_s_fault_gives_the_grant_back(root: Path, prefect_server: str) -> None:
    """MLflow away is no reason to stop the loop."""
    identifier = alarm(root, "world")
    new_data(root, 9500)
    from components.contracts.errors import RegistryUnavailable
    from flows.loop.permits import governed
    from flows.training.chosen import choose

    smoke = choose("smoke", Workspace.find(root))
    with pytest.raises(RegistryUnavailable), governed(smoke, "drift", identifier):
        raise RegistryUnavailable("MLflow is away")
    loop = loop_of(root)
    assert loop.governor.due(MODEL) == [identifier]
    with pytest.raises(ValueError, match="a bug"), governed(smoke, "drift", identifier):
        raise ValueError("a bug")
    (run,) = loop.governor.runs(MODEL)
    assert (run.state, run.outcome, run.attempts) == ("finished", "failed", 2)


def test_what_the_governor_said_is_shown(deployed: Path) -> None:
    loop = loop_of(deployed)
    loop.governor.ask(Request("drift:x", MODEL, "drift", "d", "d", seen_by="1", champion="1"), holder="h")
    shown = visionloop("governor", "history", cwd=deployed).stdout
    assert "refused (no new data)" in shown
    for arguments, words in [
        (["stop", "--as", "ann", "--reason", "quiet please"], "start no training by themselves any more (ann)"),
        (["start", "--as", "ann", "--reason", "go on"], "may start trainings again (ann)"),
        (["reset", "--as", "ann", "--reason", "looked at it"], "may go on after a training that did not help (ann)"),
    ]:
        done = visionloop("governor", *arguments, cwd=deployed)
        assert done.returncode == 0, done.stderr
        assert words in done.stdout


def test_status_without_processes_says_what_is_missing(deployed: Path, prefect_server: str) -> None:
    done = visionloop("status", "--json", cwd=deployed)
    assert done.returncode == 1
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["models"][MODEL]["champion"] == "1"
    assert found["team"] == prefect_server
    assert any("no worker of the pool 'visionloop' is online" in problem for problem in found["problems"])
    assert f"server    {prefect_server}, which PREFECT_API_URL names" in visionloop("status", cwd=deployed).stdout
    assert visionloop("down", cwd=deployed).stdout.strip() == "Stopped: nothing ran."


def test_a_team_s_server_gets_the_same(deployed: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = visionloop("deploy", "--json", cwd=deployed)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])["models"][MODEL]
    assert found["deployments"] == [f"train/{MODEL}", f"watch/{MODEL}", f"promote/{MODEL}"]
    assert len(found["automations"]) == 2
    monkeypatch.delenv("PREFECT_API_URL")
    refused = visionloop("deploy", cwd=deployed)
    assert refused.returncode == 2
    assert "no Prefect server is known here" in refused.stderr


def test_a_run_that_comes_after_the_next_one_is_skipped(deployed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that was away for nights starts one training, and no watch of last week."""
    from prefect.runtime import flow_run

    from flows.watch import watch

    planned = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=30)
    monkeypatch.setattr(flow_run, "scheduled_start_time", planned, raising=False)
    monkeypatch.setattr(flow_run, "id", "a run", raising=False)
    skipped = train(deployed, cause="schedule")
    assert skipped["rule"] == "overdue"
    assert "a later one stands for it" in skipped["reason"]
    row = loop_of(deployed).governor.history(MODEL)[-1]
    assert (row["seq"], row["decision"], row["rule"], row["reason"]) == (
        skipped["decision"],
        "refused",
        "overdue",
        skipped["reason"],
    )
    call: Any = watch
    assert "a later one stands for it" in call(MODEL, str(deployed))["skipped"]
    monkeypatch.setattr(flow_run, "scheduled_start_time", datetime.datetime.now(datetime.UTC), raising=False)
    assert train(deployed, cause="schedule")["rule"] in ("nothing changed", "cool-down", "budget")
    assert "skipped" not in call(MODEL, str(deployed))


def test_up_beside_a_server_that_is_named_already_is_refused(deployed: Path, prefect_server: str) -> None:
    done = visionloop("up", cwd=deployed)
    assert done.returncode == 2
    assert f"PREFECT_API_URL names a Prefect server already ({prefect_server})" in done.stderr


def test_a_port_that_is_taken_is_said(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    root = Path(shutil.copytree(trained, tmp_path / "copy", symlinks=True))
    monkeypatch.delenv("PREFECT_API_URL")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = visionloop("up", "--port", str(port), cwd=root)
    assert done.returncode == 2
    assert f"port {port} on 127.0.0.1 is taken" in done.stderr


def test_a_pid_that_was_given_away_is_nobody_of_ours(tmp_path: Path) -> None:
    from flows.up.processes import Up
    from flows.workspace.settings import read_settings, standing
    from flows.workspace.workspace import Workspace

    workspace = Workspace.create(tmp_path / "workspace")
    up = Up(workspace, read_settings(workspace.state))
    facts = {"pid": os.getpid(), "began": "another boot:1", "api": "http://127.0.0.1:1/api"}
    assert up.credential.startswith("visionloop:")
    (up.folder / "server.json").write_text(json.dumps(facts))
    assert up.process("server") is None
    assert standing(workspace.state) == {}
    assert (up.folder / "auth").stat().st_mode & 0o777 == 0o600
    assert up.folder.stat().st_mode & 0o777 == 0o700


def gives_way(pid: int) -> bool:
    group = Path(f"/proc/{pid}/autogroup")  # kernels without it have no sessions that compete
    return psutil.Process(pid).nice() == Limits().niceness + 10 and (
        not group.exists() or group.read_text().strip().endswith("nice 10")
    )


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that a test started, each the leader of its session."""
    made: list[subprocess.Popen[bytes]] = []
    yield made
    for process in made:
        process.kill()
        process.wait()


SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_what_trains_gives_way_to_what_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    from flows.up import processes
    from flows.workspace.settings import read_settings
    from flows.workspace.workspace import Workspace

    workspace = Workspace.create(tmp_path / "workspace")
    up = processes.Up(workspace, read_settings(workspace.state))
    spawn = subprocess.Popen
    asked: list[list[str]] = []

    def sleeper(command: list[str], **options: Any) -> Any:
        asked.append(command)
        sleepers.append(spawn(SLEEP, **options))
        return sleepers[-1]

    monkeypatch.setattr("flows.up.processes.subprocess.Popen", sleeper)
    server = processes.Standing("server", os.getpid(), "http://127.0.0.1:9/api")
    worker = up.start_worker(server, "pool", say=lambda _: None)
    assert gives_way(worker.pid)
    assert asked[0][1:-2] == ["-P", "-m", "flows.up.worker", "pool"]
    assert asked[0][-1] == "2"


def test_a_worker_is_ours_whatever_the_workspace_calls_its_folders(prefect_server: str, tmp_path: Path) -> None:
    """The real command, in a workspace with folders of these names."""
    from flows.up import processes
    from flows.workspace.settings import read_settings
    from flows.workspace.workspace import Workspace

    workspace = Workspace.create(tmp_path / "workspace")
    for name in ("flows", "components", "prefect"):
        (workspace.root / name).mkdir()
        (workspace.root / name / "__init__.py").write_text("raise SystemExit('a folder of the workspace')")
    up = processes.Up(workspace, read_settings(workspace.state))
    up.start_worker(processes.Standing("server", os.getpid(), prefect_server), "a-pool", say=lambda _: None)
    try:
        deadline = time.monotonic() + 60
        while "started!" not in up.tail("worker"):
            assert up.process("worker") is not None, up.tail("worker")
            assert time.monotonic() < deadline, up.tail("worker")
            time.sleep(0.1)
    finally:
        up.stop(say=lambda _: None)
    assert up.process("worker") is None


def test_a_flow_run_gives_way_in_the_session_that_prefect_gives_it(
    prefect_server: str, monkeypatch: pytest.MonkeyPatch, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    """A real one: test_loop_closed.py."""
    from prefect.utilities.dispatch import lookup_type
    from prefect.workers.base import BaseWorker
    from prefect.workers.process import ProcessWorker

    from flows.up.worker import YieldingWorker

    async def started(self: Any, flow_run: Any, configuration: Any, task_status: Any) -> int:
        sleepers.append(subprocess.Popen(SLEEP, start_new_session=True))
        task_status.started(sleepers[-1].pid)
        return 0

    class Heard:
        pid = 0

        def started(self, value: int) -> None:
            self.pid = value

    monkeypatch.setattr(ProcessWorker, "run", started)
    heard, nothing = Heard(), cast("Any", None)
    worker = YieldingWorker(work_pool_name="pool")
    asyncio.run(worker.run(nothing, nothing, cast("Any", heard)))
    assert heard.pid == sleepers[0].pid
    assert gives_way(heard.pid)
    asyncio.run(worker.run(nothing, nothing))
    assert gives_way(sleepers[1].pid)
    assert lookup_type(BaseWorker, YieldingWorker.type) is ProcessWorker  # Prefect's own stays what others get


@pytest.mark.parametrize(("refusals", "gave_way"), [(2, True), (1000, False)])
def test_two_sessions_give_way_though_the_kernel_takes_one_at_a_time(
    refusals: int, gave_way: bool, monkeypatch: pytest.MonkeyPatch, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    """Without CAP_SYS_ADMIN a session's niceness can be written ten times a second; who is refused for long is told."""
    from flows.up import processes

    sleepers.append(subprocess.Popen(SLEEP, start_new_session=True))
    write = Path.write_text
    refused: list[Path] = []

    def busy(path: Path, text: str) -> int:
        if path.name == "autogroup" and len(refused) < refusals:
            refused.append(path)
            raise BlockingIOError
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", busy)
    assert processes.give_way(sleepers[0].pid) is gave_way
    assert len(refused) == min(refusals, 10)
    assert not gave_way or gives_way(sleepers[0].pid)


def test_a_process_is_known_by_its_beginning(tmp_path: Path) -> None:
    from flows.workspace.settings import began

    first = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    time.sleep(0.05)  # the kernel counts the beginning in hundredths of a second
    second = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        told = began(first.pid)
        assert told is not None
        assert told != began(second.pid)
        assert told == began(first.pid)
        first.kill()
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
        assert began(first.pid) is None  # ended, though nobody has asked how
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    assert began(first.pid) is None


def test_status_tells_when_nobody_watches() -> None:
    from types import SimpleNamespace

    from flows.up.stack import _unwatched

    loop: Any = SimpleNamespace(model="m", config=SimpleNamespace(every_minutes=10))

    def ago(minutes: float) -> Any:
        moment = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=minutes)).isoformat()
        return SimpleNamespace(at=moment, window=SimpleNamespace(until=moment))

    assert _unwatched(loop, None, ago(1000)) == ""
    assert _unwatched(loop, ago(29), None) == ""
    assert _unwatched(loop, ago(1000), ago(29)) == ""
    assert _unwatched(loop, ago(29), ago(1000)) == ""  # a new champion has to gather traffic first
    for champion, last in ((ago(31), None), (ago(1000), ago(31))):
        told = _unwatched(loop, champion, last)
        assert "no window was judged since" in told
        assert "one is due every 10 minutes" in told
        assert "visionloop watch" in told
