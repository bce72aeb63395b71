"""What a command answers to errors that are not ours: exit status 2, one sentence, JSON where asked, a log."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from shapes import free_port, visionloop
from typer.testing import CliRunner

from components.contracts.errors import ConfigError, OrchestratorUnavailable, RegistryUnavailable
from flows.cli.answers import HERE, AsJson, Commands, InWorkspace
from flows.cli.failures import explained
from flows.workspace import settings
from registry import tracking
from registry.models import _reachable


def _raising(error: BaseException) -> Commands:
    app = Commands()

    @app.command("break")
    def fail(workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
        raise error

    @app.command()
    def other() -> None: ...

    return app


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/d/x"), "the disk is full"),
        (OSError(errno.EROFS, "Read-only file system", "/d/x"), "can only be read (/d/x)"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), "permission denied (/root/x)"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "a server does not answer"),
        (sqlite3.OperationalError("database or disk is full"), "the disk is full"),
        (MemoryError(), "memory"),
        (ValueError("http://me:secret@host/ is odd"), "http://***@host/"),
        (ExceptionGroup("many", [OSError(errno.ENOSPC, "No space left on device")]), "the disk is full"),
    ],
)
def test_any_error_is_an_answer(tmp_path: Path, error: Exception, expected: str) -> None:
    (tmp_path / ".visionloop").mkdir()
    app = _raising(error)
    plain = CliRunner().invoke(app, ["break", "-w", str(tmp_path)])
    assert (plain.exit_code, plain.stdout) == (2, "")
    assert expected in plain.stderr
    assert "Traceback" not in plain.stderr
    answered = CliRunner().invoke(app, ["break", "-w", str(tmp_path), "--json"])
    body = json.loads(answered.stdout.splitlines()[-1])
    assert (answered.exit_code, body["error"]) == (2, type(error).__name__)
    assert body["message"].startswith("root break stopped: ")
    assert expected in body["message"]
    log = Path(body["log"])
    assert log.parent == tmp_path / ".visionloop" / "logs"
    assert str(log) in body["message"]
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert type(error).__name__ in log.read_text()
    assert "secret" not in log.read_text()


def test_no_error_of_ours_tells_a_password(tmp_path: Path) -> None:
    error = RegistryUnavailable("http://me:p@ss:word@host/api and postgresql+psycopg2://nobody@host/db do not answer")
    error.add_note("also s3+http://me:secret@host")
    for option in ([], ["--json"]):
        done = CliRunner().invoke(_raising(error), ["break", "-w", str(tmp_path), *option])
        assert "http://***@host/api and postgresql+psycopg2://nobody@host/db" in done.output
        assert "s3+http://***@host" in done.output
        assert "word" not in done.output
        assert "secret" not in done.output


def test_a_cause_is_told_and_logs_are_few(tmp_path: Path) -> None:
    (tmp_path / ".visionloop").mkdir()
    outer = RuntimeError("the server did not start")
    outer.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert explained(outer)[0].startswith("the disk is full")
    app = _raising(outer)
    for _ in range(22):
        CliRunner().invoke(app, ["break", "-w", str(tmp_path)])
    assert len(list((tmp_path / ".visionloop" / "logs").iterdir())) == 20


def test_what_is_no_error_passes_and_a_wrong_line_is_json(tmp_path: Path) -> None:
    assert CliRunner().invoke(_raising(typer.Exit(1)), ["break"]).exit_code == 1
    assert CliRunner().invoke(_raising(KeyboardInterrupt()), ["break"]).exit_code == 130
    assert CliRunner().invoke(_raising(SystemExit(3)), ["break"]).exit_code == 3
    for arguments in (("nope",), ("recipe", "show"), ("recipe", "nope"), ("who-served",), ("runs", "--nope")):
        done = visionloop(*arguments, "--json", cwd=tmp_path)
        assert (done.returncode, json.loads(done.stdout.splitlines()[-1])["error"]) == (2, "UsageError")


def test_a_reader_that_leaves_is_no_error(pristine: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "flows", "recipe", "list"], cwd=pristine, stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert b"stopped" not in done.stderr
    assert b"Traceback" not in done.stderr


def _commands(app: typer.Typer) -> Iterator[object]:
    for command in app.registered_commands:
        yield command.cls
    for group in app.registered_groups:
        assert group.typer_instance is not None
        yield from _commands(group.typer_instance)


def test_every_command_answers_so() -> None:
    from flows.cli.app import app

    assert {getattr(found, "__name__", None) for found in _commands(app)} == {"_Command"}


def test_what_listens_on_this_machine_is_asked_without_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy", "HOME", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "intern.example, localhost")
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    before = dict(os.environ)
    try:
        settings.prepare_environment(tmp_path)
        found = {name: os.environ[name] for name in ("NO_PROXY", "no_proxy", "HOME")}
    finally:
        os.environ.clear()
        os.environ.update(before)
    listed = "intern.example,localhost,127.0.0.1,::1"
    assert found == {"NO_PROXY": listed, "no_proxy": listed, "HOME": str(tmp_path / "cache" / "home")}


def test_an_account_without_home_and_name_reads_its_workspace(workspace: Path) -> None:
    program = (
        "import pwd, sys\n"
        "def unknown(uid): raise KeyError(f'getpwuid(): uid not found: {uid}')\n"
        "pwd.getpwuid = unknown\n"
        "from flows.cli import main\n"
        "sys.argv = ['visionloop', *sys.argv[1:]]\n"
        "main()\n"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME")
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, check=False)

    told = run("data", "status")
    assert (told.returncode, told.stderr) == (0, "")
    nameless = run("train", "--recipe", "smoke")
    assert nameless.returncode == 2
    assert "has no name; say who you are: --as NAME" in nameless.stderr


def test_an_account_without_a_name_is_asked_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nameless)
    with pytest.raises(ConfigError, match="has no name; say who you are: --as NAME"):
        settings.login_name()


@pytest.mark.parametrize(
    ("address", "why"),
    [
        (f"http://127.0.0.1:{free_port()}/api", "the connection is refused. Start it, or unset PREFECT_API_URL"),
        ("localhost:4200", "PREFECT_API_URL is no http address; expected one such as"),
        ("http://localhost:port/api", "PREFECT_API_URL is no http address"),
    ],
)
def test_a_prefect_server_that_is_away_is_said_before_a_flow_begins(workspace: Path, address: str, why: str) -> None:
    done = visionloop("train", "-r", "smoke", "--as", "Ann", "--json", cwd=workspace, PREFECT_API_URL=address)
    body = json.loads(done.stdout)
    assert (done.returncode, body["error"]) == (2, "OrchestratorUnavailable")
    assert why in body["message"]


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ssh://host/data", "ssh:// is no remote that works here; use a folder"),
        ("gs://bucket/data", "gs:// is no remote"),
        ("me@host:/data", "is an address for ssh"),
        ("ftp://host/data", "ftp:// is no remote"),
    ],
)
def test_a_remote_that_cannot_work_is_refused_when_it_is_named(workspace: Path, url: str, why: str) -> None:
    before = (workspace / ".dvc" / "config").read_bytes()
    done = visionloop("data", "remote", url, cwd=workspace)
    assert done.returncode == 2
    assert why in done.stderr
    assert (workspace / ".dvc" / "config").read_bytes() == before


def test_a_deleted_experiment_is_restored_by_what_the_error_says(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    mlflow = tracking.client(address)
    number = tracking.experiment_id(mlflow, "shapes", tmp_path)
    mlflow.delete_experiment(number)
    with pytest.raises(RegistryUnavailable, match=f"restore --experiment-id {number} .with MLFLOW_TRACKING_URI=sqlite"):
        tracking.experiment_id(mlflow, "shapes", tmp_path)
    mlflow.restore_experiment(number)
    assert tracking.experiment_id(mlflow, "shapes", tmp_path) == number


def test_a_full_disk_is_not_said_to_be_mlflow_s_fault() -> None:
    wrapped = RuntimeError("MLflow could not log the artefact")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/tmp/x")
    with pytest.raises(OSError, match="No space left"), _reachable("sqlite:///x"):
        raise wrapped


def test_a_project_of_dvc_alone_is_taken_over_as_the_error_says(workspace: Path) -> None:
    pin, ledger = workspace / "data.dvc", workspace / "data.test-ledger.csv"
    ours = pin.read_text()
    ledger.unlink()
    done = visionloop("data", "add", cwd=workspace)  # a pin of ours that lost its ledger is never drawn anew
    assert (done.returncode, "git checkout -- data.test-ledger.csv" in done.stderr) == (2, True)
    assert not ledger.exists()
    pin.write_text(ours.partition("meta:")[0])
    done = visionloop("data", "status", cwd=workspace)
    assert (done.returncode, "`visionloop data add` without a folder" in done.stderr) == (2, True)
    done = visionloop("data", "add", cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert visionloop("data", "status", cwd=workspace).returncode == 0


def test_every_command_that_a_text_of_ours_advises_exists() -> None:
    """Of messages, help and comments alike: `visionloop data pull --force` is a command, and takes the option."""
    from typer.main import get_command

    from flows.cli.app import app

    root: Any = get_command(app)
    repository, found = Path(__file__).resolve().parents[2], 0
    for package in ("components", "flows", "monitoring", "registry", "serving"):
        for path in (repository / package).rglob("*.py"):
            # A string may go on in the next line.
            text = re.sub(r'"\s*\n\s*f?"', "", path.read_text())
            for advised in re.findall(r"`visionloop ([a-z][^`\n]*)`", text):
                command, words = root, advised.split()
                while words and hasattr(command, "commands"):
                    assert words[0] in command.commands, (path.name, advised)
                    command = command.commands[words.pop(0)]
                taken = {option for parameter in command.params for option in parameter.opts}
                assert {word for word in words if word.startswith("--")} <= taken, (path.name, advised)
                found += 1
    assert found > 40


@pytest.mark.parametrize(
    ("answers", "asked"),
    [
        (["no answer in time"] * 5 + [""], 6),  # Prefect's server on SQLite may stand still for a minute
        (["no answer in time"] * 6, 6),
        (["the connection is refused"] * 3, 3),
        (["it wants a credential"], 1),
    ],
)
def test_a_prefect_server_that_is_busy_is_waited_for_and_none_that_is_away(
    answers: list[str], asked: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from flows.orchestrator import events

    left = list(answers)
    monkeypatch.setattr(events, "_unanswered", lambda _: left.pop(0))
    monkeypatch.setattr("flows.orchestrator.events.time.sleep", lambda _: None)
    found = dataclasses.replace(settings.read_settings(tmp_path), prefect_api_url="http://127.0.0.1:4200/api")
    if answers[-1]:
        with pytest.raises(OrchestratorUnavailable, match=answers[-1]):
            events.expect_server(found)
    else:
        events.expect_server(found)
    assert len(answers) - len(left) == asked
