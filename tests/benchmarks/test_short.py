from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import __main__ as main

NAMES = sorted(path.stem for path in Path("bench").glob("[!_]*.py") if path.stem != "load")


def test_every_benchmark_has_a_short_mode_and_is_named_in_the_readme() -> None:
    readme = Path("README.md").read_text()
    for name in NAMES:
        assert "SHORT = {" in Path("bench", f"{name}.py").read_text(), name
        assert name in readme, name


@pytest.mark.parametrize(("load", "told"), [(2.2, True), (1.9, False)])
def test_a_machine_that_others_load_is_told_before_anything_is_measured(
    load: float, told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    warned: list[str] = []

    def run(_: object, __: Path) -> dict[str, int]:
        warned.append(capsys.readouterr().err)
        return {"ours": 1}

    monkeypatch.setattr(sys, "argv", ["bench", NAMES[0]])
    monkeypatch.setattr(importlib, "import_module", lambda _: SimpleNamespace(run=run))
    monkeypatch.setattr(main, "prepare_environment", lambda _: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    # A minute of ours is 0.63 of the average.
    monkeypatch.setattr(time, "process_time", lambda: 60.0)
    monkeypatch.setattr(os, "getloadavg", lambda: (load + 0.632, 9.0, 9.0))
    assert main.main() == 0
    expected = f"the load average of other programs is {load} on 4 cores: what is measured now is slower than this machine"
    assert [(text.count("\n"), text.startswith(expected)) for text in warned] == [(int(told), told)]
    assert json.loads(capsys.readouterr().out) == {"name": NAMES[0], "short": False, "load": load, "ours": 1}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_goes_its_whole_way(name: str, tmp_path: Path) -> None:
    """Tiny numbers: what they come to is not looked at, only that they are there."""
    done = subprocess.run(
        [sys.executable, "-m", "bench", name, "--short"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        check=False,
        timeout=1190,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "measures nothing" in done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert (found["name"], found["short"]) == (name, True)
    assert set(found) >= {"ours", "peers", "ratio", "n", "unit", "load"}
    assert not found.get("failures")
