"""What a person sees in a terminal while a command goes on."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

_SCRIPT = """
from pathlib import Path
from components.data_folder import ignore_rules
from flows.terminal import Console

with Console(1) as console, console.stage("looking", 1) as (progress, _):
    ignore_rules(Path("data"))
print("the answer")
"""


def test_the_answer_is_the_last_thing_that_a_terminal_shows(tmp_path: Path) -> None:
    """DVC's colours, imported while a bar is drawn, end the process with an escape sequence."""
    near, far = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(Path(__file__).parents[2])}
    (tmp_path / ".dvc").mkdir()
    process = subprocess.Popen([sys.executable, "-c", _SCRIPT], stdout=far, stderr=far, cwd=tmp_path, env=environment)
    os.close(far)
    seen = b""
    while True:
        try:
            piece = os.read(near, 65536)
        except OSError:  # the end of a terminal that nobody writes to any more
            break
        if not piece:
            break
        seen += piece
    os.close(near)
    assert process.wait(60) == 0, seen
    assert b"looking" in seen
    after = seen.rpartition(b"the answer")[2].replace(b"\x1b[0m", b"")
    assert after.strip() == b"", after
