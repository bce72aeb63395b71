"""Commands that read work in a workspace on a disk that can only be read, and those that write say so and change nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.workspace.settings import sqlite_url
from registry.ledger import Ledger, Principal

_COMMANDS = """
import json, sys
from typer.testing import CliRunner
from flows.cli.app import app

done = [CliRunner().invoke(app, arguments) for arguments in json.loads(sys.argv[1])]
print(json.dumps([(one.exit_code, one.stdout + one.stderr) for one in done]))
"""
"""Commands one after the other: a process each would take most of the time to begin."""
_MOUNTED = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && cd "$0" && exec "$@"'


def read_only(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command in a place that is mounted read-only for it alone; permissions would not stop root."""
    mounted = ["unshare", "--map-root-user", "--mount", "sh", "-c", _MOUNTED, str(root), *command]
    return subprocess.run(
        mounted, capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": str(root.parent)}
    )


def test_what_reads_works_on_a_disk_that_can_only_be_read(workspace: Path, tmp_path: Path) -> None:
    if shutil.which("unshare") is None or read_only(workspace, "true").returncode:
        pytest.skip("nothing can be mounted here")
    ledger = Ledger(sqlite_url(workspace / ".visionloop" / "ledger.db"))
    ledger.append(
        "rejected",
        model="shapes",
        subject="x",
        actor=Principal(name="ann", method="machine"),
        body={"version": "1"},
        key="k",
    )

    def said(*arguments: str) -> tuple[int, str]:
        done = read_only(workspace, sys.executable, "-m", "flows", *arguments)
        return done.returncode, done.stdout + done.stderr

    expected = (
        (("data", "status"), 0, "data/ is exactly that version"),
        (("data", "diff", "HEAD", "now", "--html", str(tmp_path / "diff.html")), 0, "Nothing differs"),
        (("data", "log"), 0, "180 files, 3 classes"),
        (("status",), 1, "shapes: champion version (none)"),
        (("ledger", "verify"), 0, "The ledger is whole: 1 row"),
        (("labels", "list"), 0, "shapes: no label so far"),
        (("report", "--out", str(tmp_path / "page.html")), 0, "Report: "),
        (("report",), 2, "loop-shapes.html cannot be written (Read-only file system); name a file elsewhere with --out"),
        (("down",), 0, "Stopped: nothing ran"),
        (("governor", "stop", "--as", "ann", "--reason", "why"), 2, "readonly"),
    )
    done = read_only(workspace, sys.executable, "-c", _COMMANDS, json.dumps([command for command, _, _ in expected]))
    assert done.returncode == 0, done.stderr
    for (command, status, words), (code, text) in zip(expected, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert (code, words in text) == (status, True), (command, text)
    assert "shapes" in (tmp_path / "page.html").read_text()
    shutil.rmtree(workspace / ".visionloop")  # a fresh clone has none
    code, text = said("data", "status")
    assert (code, "data/ is exactly that version" in text) == (0, True), text
    assert not (workspace / ".visionloop").exists()
    assert [path.name for path in tmp_path.glob("visionloop-*")] == []
