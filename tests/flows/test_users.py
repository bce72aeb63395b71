"""People who may sign in at the console, by the command line: what it asks, refuses, keeps and never shows."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from shapes import visionloop
from typer.testing import CliRunner

from components.contracts.errors import SignInRefused
from components.machine import account
from flows.workspace.backup import backup, restore
from flows.workspace.desk import desk
from flows.workspace.people import accounts
from flows.workspace.settings import read_settings
from flows.workspace.workspace import Workspace
from registry.approval import person
from registry.comments import Comments
from registry.ledger import FollowedLedger, Principal

PASSWORD = "correct horse battery"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return Workspace.create(tmp_path / "workspace").root


def piped(root: Path, text: str, *arguments: str) -> tuple[int, str, str]:
    """The command line with something on its standard input."""
    from flows.cli.app import app

    done = CliRunner().invoke(app, [*arguments, "-w", str(root)], input=text)
    return done.exit_code, done.stdout, done.stderr


def answer(root: Path, *arguments: str) -> dict[str, Any]:
    done = visionloop(*arguments, "--json", cwd=root)
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def refused(root: Path, *arguments: str) -> str:
    done = visionloop(*arguments, cwd=root)
    assert done.returncode == 2, (arguments, done.stdout)
    return done.stderr


def test_users_are_added_changed_and_removed(root: Path) -> None:
    add = (
        "user",
        "add",
        "ann",
        "--role",
        "approver",
        "--name",
        "Ann Lee",
        "--also",
        "annie",
        "--password-stdin",
        "--also",
        "al",
    )
    assert "No users yet" in visionloop("user", "list", cwd=root).stdout
    status, shown, beside = piped(root, PASSWORD + "\n", *add)
    assert status == 0
    assert "Ann Lee" in shown
    assert "everybody has to sign in" in beside
    users = accounts(Workspace.find(root))
    assert users.sign_in("ann", PASSWORD, address="192.0.2.1").user.known_as == ("ann", "al", "annie")
    issuer = ("--oidc", "https://id.example.org 7")
    made = answer(root, "user", "add", "root", "--role", "admin", *issuer, "--as", "Carol")
    assert (made["login"], made["has_password"], made["subject"]) == ("root", False, "https://id.example.org 7")

    changed = answer(
        root, "user", "change", "ANN", "--role", "viewer", "--also", "a.lee", "--not-also", "Annie", "--name", "Ann"
    )
    assert (changed["role"], changed["also"], changed["name"]) == ("viewer", ["Ann Lee", "a.lee", "al"], "Ann")
    assert piped(root, "another password\n", "user", "change", "ann", "--password-stdin")[0] == 0
    with pytest.raises(SignInRefused):
        users.sign_in("ann", PASSWORD, address="192.0.2.1")
    assert answer(root, "user", "change", "ann", "--disable")["enabled"] is False
    assert "disabled" in visionloop("user", "list", cwd=root).stdout
    assert answer(root, "user", "change", "ann", "--enable")["enabled"] is True
    answer(root, "user", "remove", "ann")
    assert [user["login"] for user in answer(root, "user", "list")["users"]] == ["root"]
    told = visionloop("user", "audit", cwd=root).stdout
    rows = answer(root, "user", "audit", "--limit", "2")["rows"]
    assert [row["what"] for row in rows] == ["user changed", "user removed"]
    mine = str(account()["login"] or account()["user"])
    assert (rows[-1]["who"], "user added       Carol" in told) == (mine, True)
    assert "ann from 192.0.2.1: wrong password" in told
    assert PASSWORD not in told


def test_what_is_refused_says_what_to_do_and_changes_nothing(root: Path) -> None:
    assert "--password-stdin" in refused(root, "user", "add", "ann", "--role", "viewer")  # no terminal
    assert (
        "no password on standard input" in piped(root, "\n", "user", "add", "ann", "--role", "viewer", "--password-stdin")[2]
    )
    status, _, beside = piped(root, "too short\n", "user", "add", "ann", "--role", "viewer", "--password-stdin")
    assert (status, "12 to 1024 characters" in beside, "too short" in beside) == (2, True, False)
    assert not accounts(Workspace.find(root)).any_users()
    assert piped(root, PASSWORD, "user", "add", "ann", "--role", "admin", "--password-stdin", "--also", "annie")[0] == 0
    before = answer(root, "user", "list")
    # Before anybody is asked for a password.
    assert "valid: admin, approver, trainer, viewer" in refused(root, "user", "add", "bob", "--role", "boss")
    assert "visionloop user change ann" in refused(root, "user", "add", "ann", "--role", "viewer")
    assert "the user ann is known as annie already" in refused(root, "user", "add", "Annie", "--role", "viewer")
    assert "names with '/' belong to flows" in refused(root, "user", "change", "ann", "--as", "flows/x", "--role", "viewer")
    assert "nothing to change of ann" in refused(root, "user", "change", "ann")
    assert "ann is not known as 'bob'; also known as: annie" in refused(root, "user", "change", "ann", "--not-also", "bob")
    assert "valid: ann" in refused(root, "user", "change", "bob", "--disable")
    for attempt in (("change", "ann", "--disable"), ("change", "ann", "--role", "viewer"), ("remove", "ann")):
        assert "ann is the last enabled admin" in refused(root, "user", *attempt)
    assert answer(root, "user", "list") == before


def test_a_token_is_shown_once(root: Path) -> None:
    piped(root, PASSWORD, "user", "add", "ann", "--role", "approver", "--password-stdin")
    made = answer(root, "user", "token", "ann", "--name", "ci", "--days", "2", "--role", "viewer")
    done = visionloop("user", "token", "Ann", "--name", "Report", cwd=root)
    users = accounts(Workspace.find(root))
    for token, role in ((made["token"], "viewer"), (done.stdout.strip(), "approver")):
        found = users.of_token(token)
        assert found is not None
        assert found.user.role == role
    assert (made["login"], made["role"], made["state"]) == ("ann", "viewer", "valid")
    assert "Report of ann, as approver, until 20" in done.stderr
    answer(root, "user", "revoke", "ann", "--name", "ci")
    assert users.of_token(made["token"]) is None
    assert "valid: Report" in refused(root, "user", "revoke", "ann", "--name", "ci")
    assert {token["name"]: token["state"] for token in answer(root, "user", "tokens")["tokens"]} == {
        "ci": "revoked",
        "Report": "valid",
    }
    assert answer(root, "user", "token", "ann", "--name", "CI")["role"] == "approver"
    everything = visionloop("user", "tokens", cwd=root).stdout + visionloop("user", "audit", cwd=root).stdout
    assert made["token"] not in everything
    assert done.stdout.strip() not in everything


@pytest.mark.parametrize("again", [PASSWORD, "something else"])
def test_a_password_is_asked_for_twice_and_not_shown(root: Path, again: str) -> None:
    keyboard, terminal = pty.openpty()
    command = [sys.executable, "-m", "flows", "user", "add", "ann", "--role", "viewer", "-w", str(root)]
    # Without a terminal that controls it the command asks at its standard input, which is one.
    with subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True) as asking:
        os.close(terminal)
        shown = b""
        for prompt, typed in ((b"Password of ann: ", PASSWORD), (b"The same again: ", again)):
            while prompt not in shown:
                shown += os.read(keyboard, 1000)
            os.write(keyboard, typed.encode() + b"\n")
        try:
            while part := os.read(keyboard, 1000):
                shown += part
        except OSError:  # it has ended
            pass
    os.close(keyboard)
    assert asking.returncode == (0 if again == PASSWORD else 2), shown
    assert PASSWORD.encode() not in shown
    assert accounts(Workspace.find(root)).any_users() == (again == PASSWORD)
    assert (b"the two passwords differ" in shown) == (again != PASSWORD)


def test_a_backup_keeps_people_and_what_they_said_and_no_session(root: Path, tmp_path: Path) -> None:
    workspace = Workspace.find(root)
    url = read_settings(workspace.state).ledger_url
    backup(workspace, tmp_path / "none.tar", with_artefacts=False, force=False)  # nobody was added yet
    users = accounts(workspace)
    users.add("ann", role="admin", password=PASSWORD, by="root")
    session = users.sign_in("ann", PASSWORD, address="192.0.2.1").token
    said = Comments(url).add("m", "1", person("ann", "password"), "looks fine")
    backup(workspace, tmp_path / "b.tar", with_artefacts=False, force=False)
    found = restore(tmp_path / "b.tar", tmp_path / "restored").root
    there = accounts(Workspace.find(found))
    assert there.users() == users.users()
    assert there.audit_rows() == users.audit_rows()
    assert there.session(session) is None
    assert users.session(session) is not None
    assert Comments(read_settings(found / ".visionloop").ledger_url).of("m", "1") == [said]


def test_a_desk_is_opened_on_a_ledger_that_is_followed(root: Path) -> None:
    followed = FollowedLedger(read_settings(Workspace.find(root).state).ledger_url)
    machine = Principal(name="flows/train", method="machine")
    followed.append("requested", model="m", subject="s", actor=machine, body={"version": "1", "bound": {}}, key="k")
    assert desk(root, None, followed).ledger is followed
    assert desk(root, None).ledger is not followed
