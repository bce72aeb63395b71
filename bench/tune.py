"""`visionloop tune` over 20 trials of the recipe `transfer` against as many `visionloop train`: whole processes.

Both begin with cold caches in workspaces of their own. RUNS separate runs are timed, with values that the search tried: the
first, which fills the caches, counts once and the mean of the others for each of the rest. Without DATA the pictures are the
embedded digits and the recipe is `digits` with a search of its rate.
"""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.serving import pinned, say

TRIALS = 20
RUNS = 4
SETTINGS: tuple[str, ...] = ()
_OF_DIGITS = "search={space: {training.fit.learning_rate: {low: 0.0005, high: 0.01, log: true}}}"
SHORT = {
    "TRIALS": 2,
    "RUNS": 2,
    "SETTINGS": ("training.fit.epochs=1", "export.targets=[{target: openvino, precision: int8}]"),
}


def run(data: Path | None, scratch: Path) -> dict[str, Any]:
    """Seconds of the search; the ratio is the separate runs' over it."""
    searched = pinned(data, scratch)
    separate = Path(shutil.copytree(searched, scratch / "separate", symlinks=True))
    recipe = "transfer" if data is not None else "digits"
    settings = [part for one in (*SETTINGS, *(() if data is not None else (_OF_DIGITS,))) for part in ("-s", one)]
    found, ours, worked = _timed(searched, "tune", "-r", recipe, *settings, "--trials", str(TRIALS))
    say(f"  the search: {ours:.1f} s, {worked:.1f} s of the processor, {found['trials']}")
    trials = _visionloop(searched, "study", "show", found["study"])["trials"]
    seconds, of_processor = [], []
    for trial in trials[:RUNS]:
        chosen = [part for key, value in trial["params"].items() for part in ("-s", f"{key}={value}")]
        _, took, work = _timed(separate, "train", "-r", recipe, *settings, *chosen)
        seconds.append(took)
        of_processor.append(work)
        say(f"  a separate run: {took:.1f} s, {work:.1f} s of the processor")
    peers = _of_all(seconds)
    return {
        "ours": round(ours, 1),
        "peers": {f"{TRIALS} separate runs, of which {RUNS} were timed": round(peers, 1)},
        "ratio": round(peers / ours, 1),
        # What other programs take of the machine changes this less.
        "ratio_of_processor_time": round(_of_all(of_processor) / worked, 1),
        "spread": [round(min(seconds[1:]), 1), round(max(seconds[1:]), 1)],
        "trials": found["trials"],
        "best": found["best"],
        "own": found["own"],
        "n": TRIALS,
        "unit": "seconds of wall time",
    }


def _of_all(few: list[float]) -> float:
    """What TRIALS separate runs take, told from a few: the first fills the caches."""
    return few[0] + (TRIALS - 1) * statistics.mean(few[1:])


def _timed(workspace: Path, *arguments: str) -> tuple[dict[str, Any], float, float]:
    """A command's answer, its seconds of wall time, and those of the processor."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    found = _visionloop(workspace, *arguments)
    took, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return found, took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _visionloop(workspace: Path, *arguments: str) -> dict[str, Any]:
    """What a command answers; a rejected model is an answer too."""
    command = [sys.executable, "-m", "flows", *arguments, "--workspace", str(workspace), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(done.stderr[-2000:] + done.stdout[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
