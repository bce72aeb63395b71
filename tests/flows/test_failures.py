"""What a command answers to errors that are not ours: exit status 2, one sentence, JSON where asked, a log."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from shapes import visionloop
from typer.testing import CliRunner

from flows.answering import HERE, AsJson, Commands, InWorkspace
from flows.failures import explained


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
    from flows.cli import app

    assert {getattr(found, "__name__", None) for found in _commands(app)} == {"_Command"}
