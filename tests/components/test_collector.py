from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from components import collector

ROOT = Path(__file__).resolve().parents[2]
# Registered before what the process registers, so it runs after that.
TOLD = """
import atexit, gc
usual = gc.get_threshold()
atexit.register(lambda: print("left", gc.get_freeze_count(), gc.get_threshold() == usual, gc.get_threshold()[0]))
"""


def left(code: str, given: str, status: int) -> list[str]:
    """Frozen objects at the very end of a process, whether its threshold is the usual one, and the threshold."""
    done = subprocess.run([sys.executable, "-c", TOLD + code], capture_output=True, text=True, input=given, cwd=ROOT)
    assert done.returncode == status, done.stderr
    # An exporter answers on its standard output alone: what else is printed there goes to the other one.
    return (done.stdout + done.stderr).rpartition("left ")[2].split()


def test_a_command_collects_as_usual_but_not_at_its_end() -> None:
    code = "import sys; sys.argv[1:] = ['--help']; from flows.cli import main; main()"
    frozen, usual, _ = left(code, "", status=0)
    assert int(frozen) > 10_000
    assert usual == "True"  # it may be a server that runs for weeks


def test_an_exporter_collects_seldom_and_not_at_its_end() -> None:
    code = "import runpy; runpy.run_module('components.export', run_name='__main__', alter_sys=True)"
    # A request without a checkpoint: the exporter dies of it, which changes nothing here.
    frozen, _, threshold = left(code, "{}", status=1)
    assert int(frozen) > 10_000
    assert threshold == "20000"


@pytest.mark.parametrize("on", [True, False])
def test_what_is_kept_is_never_searched_and_the_switch_is_as_before(on: bool) -> None:
    def failing() -> None:
        with collector.kept():
            assert not gc.isenabled()
            raise OSError("down")

    (gc.enable if on else gc.disable)()
    frozen = gc.get_freeze_count()
    try:
        with pytest.raises(OSError, match="down"):
            failing()
        assert gc.isenabled() is on
        assert gc.get_freeze_count() > frozen
    finally:
        gc.enable()
        gc.unfreeze()
