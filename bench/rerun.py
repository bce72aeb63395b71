"""`visionloop train` when nothing changed, with a Prefect server up, against the first run: wall time of whole processes.

With DATA it trains the recipe `transfer` on these photographs, without it `digits` on the embedded digits.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from bench.serving import pinned, say

RERUNS = 5
SETTINGS: tuple[str, ...] = ()
SHORT = {"RERUNS": 1, "SETTINGS": ("training.fit.epochs=1", "export.targets=[{target: openvino, precision: int8}]")}


def run(data: Path | None, scratch: Path) -> dict[str, Any]:
    """Seconds of the rerun that finds everything in the store, median of RERUNS; the ratio is the first run's over it."""
    workspace = pinned(data, scratch)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (scratch / "server.log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        api = f"http://127.0.0.1:{port}/api"
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"{api}/health", timeout=2):
                    break
            except OSError:
                time.sleep(0.2)
        recipe = "transfer" if data is not None else "digits"
        first, _ = _timed(workspace, recipe, api, "the first run")
        # Untimed: it fills Python's and DVC's caches, and a noisy latency is measured again, at most three times.
        for _ in range(4):
            if not _timed(workspace, recipe, api, "a rerun before those that count")[1]:
                break
        else:
            raise SystemExit("every rerun computed something again, so none was a rerun")
        reruns = [_timed(workspace, recipe, api, f"rerun {number + 1}")[0] for number in range(RERUNS)]
    finally:
        server.terminate()
        server.wait(30)
    ours = statistics.median(reruns)
    return {
        "ours": round(ours, 2),
        "peers": {"first run": round(first, 1)},
        "ratio": round(first / ours, 1),
        "spread": [round(min(reruns), 2), round(max(reruns), 2)],
        "n": len(reruns),
        "unit": "seconds of wall time, server up",
    }


def _timed(workspace: Path, recipe: str, api: str, name: str) -> tuple[float, list[str]]:
    """Seconds of a training command, and the stages that it computed."""
    start = time.perf_counter()
    summary = _train(workspace, recipe, api)
    seconds = time.perf_counter() - start
    computed = sorted(stage for stage, spent in summary["seconds"].items() if not spent["cached"])
    say(f"  {name}: {seconds:.1f} s, {len(computed)} stages computed")
    return seconds, computed


def _train(workspace: Path, recipe: str, api: str) -> dict[str, Any]:
    """One whole training command; its summary. A rejected model is an answer too."""
    command = [sys.executable, "-m", "flows", "train", "-r", recipe, "--json"]
    for setting in SETTINGS:
        command += ["--set", setting]
    environment = {**os.environ, "PREFECT_API_URL": api}
    done = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"the training failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    summary: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return summary
