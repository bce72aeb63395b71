from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = sorted(path.stem for path in Path("bench").glob("[!_]*.py") if path.stem != "load")


def test_every_benchmark_has_a_short_mode_and_is_named_in_the_readme() -> None:
    readme = Path("README.md").read_text()
    for name in NAMES:
        assert "SHORT = {" in Path("bench", f"{name}.py").read_text(), name
        assert name in readme, name


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
    assert set(found) >= {"ours", "peers", "ratio", "n", "unit"}
    assert not found.get("failures")
