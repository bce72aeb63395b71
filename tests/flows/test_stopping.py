"""A command that is asked to stop says so in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_SCRIPT = """
import signal, sys
from flows import stopping

stopping._kill_family = lambda: print("Aborted!", file=sys.stderr, flush=True)
stopping.end(signal.SIGINT)
"""


def test_nothing_is_said_after_the_line_that_says_where_it_stopped() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", _SCRIPT], cwd=root, capture_output=True, text=True, check=False)
    assert (done.stderr, done.returncode) == ("stopped by Ctrl-C\n", 130)
