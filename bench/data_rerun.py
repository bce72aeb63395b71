"""`data add`, `data check` and a training's validation and splitting when nothing changed, against the first time.

Every time is that of a whole process, but for validation and splitting: those are stages of `train`, which tells them. DATA
is a folder of class folders, or of train/ and test/ with class folders in them, whose test is kept. Without it pictures of
coloured squares are drawn: the time is that of small files, the issues mean nothing.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.serving import say

NUM_IMAGES = 60_000
"""How many are drawn; of DATA all are taken."""
RERUNS = 3
SHORT = {"NUM_IMAGES": 200, "RERUNS": 1}
_SETTINGS = (
    "source=null",
    "training.fit.epochs=1",
    "export.serving=openvino-fp32",
    "export.targets=[{target: openvino}]",
    "evaluation.latency_runs=20",
)
"""Of the recipe `digits`: what comes after splitting is of no interest, and a rejection is an answer too."""


def run(data: Path | None, scratch: Path) -> dict[str, Any]:
    """Seconds of a repeated check, validation and splitting together; the ratio is the first time's over it."""
    source = data.resolve() if data is not None else _drawn(scratch / "pictures")
    workspace = scratch / "workspace"
    _timed(["init", str(workspace)], scratch, "a workspace")
    add = ["data", "add", str(source), "--near-duplicates", "exclude"]
    if (source / "train").is_dir() and (source / "test").is_dir():
        add.append("--keep-splits")
    train = ["train", "-r", "digits", *(word for setting in _SETTINGS for word in ("--set", setting))]
    first_add, version = _timed(add, workspace, "first add")
    adds = [_timed(add, workspace, "add again")[0] for _ in range(RERUNS)]
    identity = ["-c", "user.name=bench", "-c", "user.email=bench@bench.invalid", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, "commit", "--quiet", "-m", "bench"], cwd=workspace, check=True)
    check = ["data", "check"]
    first_check, checked = _timed(check, workspace, "first check", may_be_no=True)
    checks = [_timed(check, workspace, "check again", may_be_no=True)[0] for _ in range(RERUNS)]
    first_stages = _stages(_timed(train, workspace, "first training", may_be_no=True)[1], cached=False)
    stages = [_stages(_timed(train, workspace, "training again", may_be_no=True)[1], cached=True) for _ in range(RERUNS)]
    told = {
        "add": (first_add, adds),
        "check": (first_check, checks),
        **{name: (first_stages[name], [each[name] for each in stages]) for name in first_stages},
    }
    first = sum(told[name][0] for name in ("check", "validation", "splitting"))
    ours = sum(statistics.median(told[name][1]) for name in ("check", "validation", "splitting"))
    return {
        "ours": round(ours, 2),
        "peers": {"the first time": round(first, 1)},
        "ratio": round(first / ours, 1),
        "n": version["files"],
        "unit": f"seconds of check, validation and splitting again, medians of {RERUNS}",
        "seconds": {
            name: {
                "first": round(once, 2),
                "again": round(statistics.median(again), 2),
                "spread": [round(min(again), 2), round(max(again), 2)],
            }
            for name, (once, again) in told.items()
        },
        "issues": len(checked["issues"]),
        "data": str(data) if data else "synthetic",
    }


def _stages(summary: dict[str, Any], *, cached: bool) -> dict[str, float]:
    """Seconds of a training's first two stages, which are to be computed or found in the store."""
    found = {name: summary["seconds"][name] for name in ("validation", "splitting")}
    if any(each["cached"] != cached for each in found.values()):
        raise SystemExit(f"expected both stages {'found in the store' if cached else 'computed'}, and they were {found}")
    return {name: each["seconds"] for name, each in found.items()}


def _timed(arguments: list[str], cwd: Path, name: str, *, may_be_no: bool = False) -> tuple[float, dict[str, Any]]:
    """Seconds of a command and its JSON answer; `may_be_no` where that is one: issues found, a model rejected."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "flows", *arguments, "--json"], cwd=cwd, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode not in ((0, 1) if may_be_no else (0,)):
        raise SystemExit(f"visionloop {' '.join(arguments)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    say(f"  {name}: {seconds:.1f} s")
    return seconds, answer


def _drawn(folder: Path) -> Path:
    """Ten classes of small pictures, no two alike; a class is a little redder or less red than the next."""
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        place = folder / f"class {number % 10}" / f"{number:06d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        squares = rng.integers(0, 220, (8, 8, 3), dtype=np.uint8)
        squares[..., 0] = squares[..., 0] // 2 + 10 * (number % 10)
        Image.fromarray(squares).resize((64, 64), Image.Resampling.BICUBIC).save(place, quality=90)
    return folder
