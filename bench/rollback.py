"""`visionloop rollback`, the whole command, against a bare script that moves nothing but MLflow's alias.

Ours verifies every byte of the release, appends to the ledger, moves the routes and the alias, and reads all back. Both
sides are processes of their own, imports included, in turns; the champion goes back and forth between two versions. Once
with nothing beside, and once with what `visionloop up` keeps running on the same processors, when a rollback also sends an
event. With DATA its releases are of photographs, without it of the embedded digits.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.serving import prepared, promoted, say, visionloop

RUNS = 7
_SETTLE_S = 15.0
"""What `up` starts is busy with itself at first."""
_ALIAS = """
import sys
from mlflow import MlflowClient
uri, model, version = sys.argv[1:]
MlflowClient(uri).set_registered_model_alias(model, "bench", version)
"""


def run(data: Path | None, scratch: Path) -> dict[str, Any]:
    """Seconds of a rollback on SQLite and a folder, medians of 7, with and without a Prefect server."""
    workspace, model = prepared(data, scratch)
    versions = ["1", promoted(data, workspace, "training.fit.epochs=10")]
    alone = _in_turns(workspace, model, versions)
    say("with a Prefect server and a worker on the same processors")
    try:
        visionloop("up", cwd=workspace)
        time.sleep(_SETTLE_S)
        beside = _in_turns(workspace, model, versions)
    finally:
        visionloop("down", cwd=workspace)
    return {**alone, "with_up": beside, "n": RUNS, "unit": "seconds of wall time, whole command"}


def _in_turns(workspace: Path, model: str, versions: list[str]) -> dict[str, Any]:
    uri = f"sqlite:///{workspace / '.visionloop' / 'mlflow.db'}"
    ours, bare = [], []
    # The first of each still fills caches. It goes to the older version: the newer one was promoted last.
    for number in range(RUNS + 1):
        target = versions[number % 2]
        arguments = ["rollback", "--to", target, "--as", "bench", "--reason", f"benchmark {number}"]
        since = time.perf_counter()
        visionloop(*arguments, cwd=workspace)
        ours.append(time.perf_counter() - since)
        since = time.perf_counter()
        subprocess.run([sys.executable, "-c", _ALIAS, uri, model, target], check=True, capture_output=True)
        bare.append(time.perf_counter() - since)
    ours, bare = ours[1:], bare[1:]
    return {
        "ours": round(statistics.median(ours), 2),
        "peers": {"MLflow's alias alone": round(statistics.median(bare), 2)},
        "ratio": round(statistics.median(bare) / statistics.median(ours), 2),
        "spread": {"ours": [round(min(ours), 2), round(max(ours), 2)], "peer": [round(min(bare), 2), round(max(bare), 2)]},
    }
