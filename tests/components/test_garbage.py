from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Registered before what the process registers, so it runs after that.
TOLD = "import atexit, gc; atexit.register(lambda: print('left', gc.get_freeze_count(), gc.get_threshold()[0])); "


def left(code: str) -> tuple[int, int]:
    """Frozen objects at the very end of a process, and its threshold."""
    done = subprocess.run([sys.executable, "-c", TOLD + code], capture_output=True, text=True, input="{}", cwd=ROOT)
    frozen, threshold = done.stdout.rpartition("left ")[2].split()
    return int(frozen), int(threshold)


def test_a_command_ends_without_a_search_for_garbage() -> None:
    frozen, threshold = left("import sys; sys.argv[1:] = ['--help']; from flows.cli import main; main()")
    assert frozen > 10_000
    assert threshold == 700  # a command may run for weeks


def test_an_exporter_seldom_looks_for_garbage_and_not_at_its_end() -> None:
    frozen, threshold = left("import runpy; runpy.run_module('components.export', run_name='__main__', alter_sys=True)")
    assert frozen > 10_000
    assert threshold == 20_000
