"""The whole loop with its own server and worker: slow, and real."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from looped import MODEL, loop_of, now, predict, promoted
from shapes import commit, free_port, visionloop_process, write_pictures
from stores import fresh_database

AUTOGROUP = Path("/proc/self/autogroup")
"""Where Linux shares the processors between sessions first."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def command(*arguments: str, cwd: Path, accepted: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """The command line in a process of its own, without the session's Prefect server."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-m", "flows", *arguments, "--json"],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    assert done.returncode in accepted, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


both = pytest.mark.parametrize("up", ["sqlite", "postgresql"], indirect=True)
default = pytest.mark.parametrize("up", ["sqlite"], indirect=True)


@pytest.fixture
def up(request: pytest.FixtureRequest, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A workspace whose loop is up: Prefect and the loop's tables on SQLite, or on PostgreSQL."""
    if request.param == "postgresql":
        url = fresh_database(request.getfixturevalue("postgres"))
        monkeypatch.setenv("VISIONLOOP_PREFECT_DB", url.replace("+psycopg2", "+asyncpg"))
        monkeypatch.setenv("VISIONLOOP_LOOP_URL", url)
    root = promoted(trained, tmp_path / "workspace")
    without_its_own_runs(root)
    told = command("up", "--port", str(free_port()), cwd=root)
    assert told["models"][MODEL]["deployments"] == [f"train/{MODEL}", f"watch/{MODEL}", f"promote/{MODEL}"]
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    yield root
    stopped = command("down", cwd=root)
    assert {"worker", "server"} <= set(stopped["stopped"])
    for name in ("server", "worker"):
        assert not psutil.pid_exists(told[name]["pid"]) or psutil.Process(told[name]["pid"]).status() == "zombie"


def without_its_own_runs(root: Path) -> None:
    """No watch and no nightly training within two hours: at the full hour they would mix with what a test starts itself."""
    minute = int(time.time()) // 60
    length = next(length for length in range(1440, 720, -1) if length - minute % length > 120)
    path = root / "loops" / f"{MODEL}.yaml"
    loop = path.read_text().replace("every_minutes: 60\n", f"every_minutes: {length}\n")
    assert str(length) in loop
    path.write_text(loop + f'nightly: "0 {(minute // 60 + 12) % 24} * * *"\n')


def alarm(root: Path, name: str = "p") -> str:
    since = now()
    predict(root, 120, shift=4, name=name)
    (identifier,) = command("watch", "--since", since, cwd=root, accepted=(1,))["alarms"]
    return str(identifier)


def new_data(root: Path, seed: int) -> None:
    write_pictures(root.parent / f"more-{seed}", 4, start=seed)
    command("data", "add", str(root.parent / f"more-{seed}"), cwd=root)
    commit(root)


def wait_for(condition: Any, what: str, root: Path, timeout_s: float = 240) -> Any:
    deadline = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found:
            return found
        log = (root / ".visionloop" / "up" / "worker.log").read_text()[-3000:]
        assert time.monotonic() < deadline, f"{what} did not come\n{log}"
        time.sleep(0.5)


def granted(root: Path) -> Any:
    runs = loop_of(root).governor.runs(MODEL)
    return runs[-1] if runs else None


def children(root: Path) -> list[psutil.Process]:
    """Flow run processes of the worker."""
    pid = json.loads((root / ".visionloop" / "up" / "worker.json").read_text())["pid"]
    return [
        child
        for child in psutil.Process(pid).children(recursive=True)
        if "flow-run" in " ".join(child.cmdline()) or "prefect" in " ".join(child.cmdline())
    ]


def sessions(worker: int) -> Iterator[tuple[bool, int, str]]:
    """Of every flow run: whether it leads a session, its niceness, and its session's (10 where Linux does not have that)."""
    for flow_run in psutil.Process(worker).children():
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):  # ended meanwhile
            told = Path(f"/proc/{flow_run.pid}/autogroup").read_text() if AUTOGROUP.exists() else "10"
            yield os.getsid(flow_run.pid) == flow_run.pid, flow_run.nice(), "".join(told.split()[-1:])


@both
def test_an_alarm_trains_once_and_a_killed_training_is_taken_up_once(up: Path) -> None:
    status = command("status", cwd=up)
    assert status["problems"] == []
    assert psutil.Process(status["worker"]["pid"]).nice() == 15
    # The server asks for its credential.
    port = int(status["server"]["api"].split(":")[2].split("/")[0])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("POST", "/api/events", "[]", {"content-type": "application/json"})
    assert connection.getresponse().status == 401
    connection.close()
    new_data(up, 9200)
    began = time.monotonic()
    identifier = alarm(up)
    run = wait_for(lambda: granted(up), "the grant", up)
    print(f"alarm to running training: {time.monotonic() - began:.1f} s, the watch included")
    assert (run.key, run.attempts) == (identifier, 1)
    # More deliveries of the same event are duplicates, and no second training (a hundred of them: test_governor.py).
    deliver(up, identifier, 3)
    # kill -9 of the training, in the middle of it.
    partial = up / ".visionloop" / "store"
    wait_for(lambda: list(partial.glob("splitting/*")) and list(partial.glob("*/*")), "the first stages", up)
    # Prefect gives each flow run a session of its own, which gives way as the worker's does as soon as the worker hears of it.
    wait_for(lambda: set(sessions(status["worker"]["pid"])) == {(True, 15, "10")}, "a flow run that gives way", up, 30)
    victims = children(up)
    assert victims
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
    wait_for(lambda: granted(up).state == "crashed", "the end of the lease", up)
    assert command("sweep", cwd=up)["started"][0]["key"] == identifier
    wait_for(lambda: granted(up).state == "finished", "the second attempt", up, 400)
    run = granted(up)
    assert (run.key, run.attempts) == (identifier, 2)
    assert run.outcome in ("candidate", "rejection")
    assert command("sweep", cwd=up)["started"] == []
    rules = [row["rule"] for row in loop_of(up).governor.history(MODEL)]
    assert rules.count("granted") == rules.count("resumed") == 1
    assert set(rules) <= {"granted", "resumed", "duplicate"}
    # Prefect's scheduler makes the next runs once a minute: by now it has.
    wait_for(lambda: {"train", "watch"} <= set(command("status", cwd=up)["models"][MODEL]["scheduled"]), "a schedule", up)


def deliver(root: Path, identifier: str, count: int) -> None:
    """Send the alarm's event again, as a client that repeats itself."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom flows.training.run import Workspace\nfrom flows.workspace.settings import prepare_environment\n"
        "workspace = Workspace.find(Path('.'))\nprepare_environment(workspace.state)\n"
        "from flows.loop.alarms import DRIFT, emit\nfrom flows.loop.windows import open_loop\n"
        f"loop = open_loop(Path('.'), '{MODEL}')\nalarm = loop.outbox.alarm(sys.argv[1])\n"
        f"[emit(loop, DRIFT, alarm) for _ in range({count})]\n"
        "assert 'prefect' not in sys.modules, 'the server of `up` did not take the plain request'\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    subprocess.run([sys.executable, "-c", code, identifier], cwd=root, env=environment, check=True, capture_output=True)


@default
def test_the_server_killed_at_the_alarm_costs_nothing(up: Path) -> None:
    """Prefect dies, an alarm is raised, Prefect comes back: one training."""
    new_data(up, 9300)
    os.kill(command("status", cwd=up)["server"]["pid"], signal.SIGKILL)
    wait_for(lambda: command("status", cwd=up, accepted=(0, 1))["server"] is None, "the end of the server", up)
    since = now()
    predict(up, 120, shift=4, name="dark")
    (identifier,) = command("watch", "--since", since, cwd=up, accepted=(1,))["alarms"]
    assert granted(up) is None
    command("up", cwd=up)  # which sweeps
    wait_for(lambda: granted(up) and granted(up).state == "finished", "the training", up, 400)
    assert granted(up).key == identifier
    assert command("sweep", cwd=up)["started"] == []


@default
def test_up_twice_is_up_once_and_a_run_whose_worker_died_is_marked_as_crashed(up: Path) -> None:
    """A worker that dies comes back with the next `up`. Dies its training with it, the heartbeat automation says so in Prefect
    and the next `up` takes it up once."""
    told = command("up", cwd=up)
    before = command("status", cwd=up)
    assert told["server"]["pid"] == before["server"]["pid"]
    os.kill(before["worker"]["pid"], signal.SIGKILL)
    wait_for(lambda: command("status", cwd=up, accepted=(0, 1))["worker"] is None, "the end of the worker", up)
    assert command("status", cwd=up, accepted=(1,))["problems"] == [
        "no worker runs here, so nothing that is scheduled happens: visionloop up"
    ]
    again = command("up", cwd=up)
    assert again["server"]["pid"] == told["server"]["pid"]
    assert again["worker"]["pid"] != before["worker"]["pid"]
    new_data(up, 9400)
    identifier = alarm(up)
    wait_for(lambda: granted(up), "the grant", up)
    worker = psutil.Process(command("status", cwd=up)["worker"]["pid"])
    family = [*worker.children(recursive=True), worker]
    # Long enough for a first heartbeat.
    wait_for(lambda: heartbeats(up), "a heartbeat", up)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    found = wait_for(lambda: states(up, identifier, "Crashed"), "the mark", up, 300)
    assert found
    command("up", cwd=up)  # which sweeps
    wait_for(lambda: granted(up).state == "finished", "the second attempt", up, 400)
    assert granted(up).attempts == 2


def _asked(root: Path, code: str, *arguments: str) -> Any:
    program = (
        "import json, sys\nfrom pathlib import Path\nfrom flows.training.run import Workspace\nfrom flows.workspace.settings import prepare_environment\n"
        "prepare_environment(Workspace.find(Path('.')).state)\nfrom flows.loop.windows import open_loop\n"
        f"loop = open_loop(Path('.'), '{MODEL}')\n{code}"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=root, env=environment, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def heartbeats(root: Path) -> Any:
    code = "from flows.loop.flow_runs import events\nprint(json.dumps(events(loop, ['prefect.flow-run.heartbeat'])))"
    return _asked(root, code)


def states(root: Path, identifier: str, name: str) -> Any:
    code = (
        "from flows.loop.flow_runs import training_runs\n"
        "print(json.dumps([r for r in training_runs(loop, request=sys.argv[1]) if r['state'] == sys.argv[2]]))"
    )
    return _asked(root, code, identifier, name)


def test_mlflow_s_pages_ask_for_the_credential(tmp_path: Path) -> None:
    import base64
    import urllib.error
    import urllib.request

    from flows.up.processes import Up
    from flows.workspace.settings import read_settings
    from flows.workspace.workspace import Workspace

    workspace = Workspace.create(tmp_path / "workspace")
    up = Up(workspace, read_settings(workspace.state))

    def status(address: str, credential: str = "") -> int:
        head = {"Authorization": "Basic " + base64.b64encode(credential.encode()).decode()} if credential else {}
        try:
            with urllib.request.urlopen(urllib.request.Request(address, headers=head), timeout=30) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0  # not yet

    try:
        address = up.start_pages(say=lambda _: None)["MLflow"]
        deadline = time.monotonic() + 90
        while not status(address):
            assert time.monotonic() < deadline, (up.folder / "mlflow.log").read_text()[-2000:]
            time.sleep(0.5)
        assert status(address) == 401
        assert status(address, "visionloop:guess") == 401
        assert status(address, up.credential) == 200
        assert up.start_pages(say=lambda _: None)["MLflow"] == address  # still the same process
    finally:
        assert set(up.stop(say=lambda _: None)) == {"mlflow", "evidently"}


@pytest.mark.timeout(1800)
def test_the_demo_closes_the_loop(tmp_path: Path) -> None:
    """All of it on the embedded digits, and a second time: nothing is done twice."""
    folder = tmp_path / "demo"
    arguments = ("demo", "--directory", str(folder), "--port", str(free_port()), "--stop")
    try:
        told = command(*arguments, cwd=tmp_path)
        again = command(*arguments, cwd=tmp_path)
    finally:
        # A demo that ends early leaves what it started, to be looked at.
        visionloop_process("down", "-w", str(folder), cwd=tmp_path)
    phases = told["phases"]
    assert [phases[name]["verdict"]["status"] for name in ("clean", "shifted", "camera")] == ["pass", "drift", "drift"]
    assert phases["camera"]["rule"] == "broken input"
    assert told["failed_during_switch"] == 0
    assert told["shifted_after"]["low"] > told["shifted_before"]["high"]
    made = [run for run in phases["labels"]["trail"] if run["state"] == "Completed"]
    assert [(run["event"], run["created_by"]["type"]) for run in made] == [("visionloop.data.added", "AUTOMATION")]
    assert (folder / "report.html").is_file()
    assert told["pages"] == {}
    rows = told["ledger_rows"]
    assert again["ledger_rows"] == rows
    assert again["phases"] == phases
    assert visionloop_process("ledger", "verify", cwd=folder).returncode == 0
