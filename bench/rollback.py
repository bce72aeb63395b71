"""`visionloop rollback`, the whole command, against a bare script that moves nothing but MLflow's alias.

Ours verifies every byte of the release, appends to the ledger, moves the routes and the alias, and reads all back. Both
sides are processes of their own, imports included, in turns; the champion goes back and forth between two versions. Once
with nothing beside, once with what `visionloop up` keeps running on the same processors, when a rollback also sends an
event, and once while its worker runs watches, two at a time. With DATA its releases are of photographs, without it of the
embedded digits.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import requests
from requests.adapters import HTTPAdapter
from urllib3 import Retry

from bench.serving import TINY, prepared, promoted, say, visionloop

RUNS = 7
_SETTLE_S = 15.0
"""What `up` starts is busy with itself at first."""
_WATCHES = 60
_FIRST: tuple[str, ...] = ()
_SECOND: tuple[str, ...] = ("training.fit.epochs=10",)
"""Settings of the two versions between which it goes."""
SHORT = {"_FIRST": TINY, "_SECOND": (*TINY, "training.fit.seed=1"), "RUNS": 1, "_SETTLE_S": 2.0, "_WATCHES": 12}
_ALIAS = """
import sys
from mlflow import MlflowClient
uri, model, version = sys.argv[1:]
MlflowClient(uri).set_registered_model_alias(model, "bench", version)
"""


def run(data: Path | None, scratch: Path) -> dict[str, Any]:
    """Seconds of a rollback on SQLite and a folder, medians of RUNS, with and without a Prefect server."""
    workspace, model = prepared(data, scratch, *_FIRST)
    versions = ["1", promoted(data, workspace, *_SECOND)]
    alone = _in_turns(workspace, model, versions)
    say("with a Prefect server and a worker on the same processors")
    try:
        up = visionloop("up", cwd=workspace)
        time.sleep(_SETTLE_S)
        beside = _in_turns(workspace, model, versions)
        say("while its worker runs watches")
        _start_watches(up, model)
        busy = _in_turns(workspace, model, versions, worker=up["worker"]["pid"])
    finally:
        visionloop("down", cwd=workspace)
    return {**alone, "with_up": beside, "with_watches": busy, "n": RUNS, "unit": "seconds of wall time, whole command"}


def _start_watches(up: dict[str, Any], model: str) -> None:
    """Flow runs that are due, more than the worker gets done meanwhile: mostly the start of a process and its imports."""
    api = f"{up['server']['api']}/deployments"
    with requests.Session() as session:
        user, _, password = Path(up["credential_file"]).read_text().strip().partition(":")
        session.auth = (user, password)
        deployment = session.get(f"{api}/name/watch/{model}", timeout=30).json()["id"]
        # SQLite is busy now and then, and the server says so.
        busy = Retry(total=8, backoff_factor=0.2, status_forcelist=[503], allowed_methods=None)
        session.mount(api, HTTPAdapter(max_retries=busy))
        for _ in range(_WATCHES):
            made = session.post(f"{api}/{deployment}/create_flow_run", json={"state": {"type": "SCHEDULED"}}, timeout=30)
            made.raise_for_status()
    time.sleep(_SETTLE_S)


def _wait_for_two(worker: int) -> None:
    """Until the worker runs as many flows as it does at once; each leads a session of its own. Raises RuntimeError."""
    deadline = time.monotonic() + 60
    running = 0
    while running < 2:
        if time.monotonic() > deadline:
            raise RuntimeError("the worker does not run two flows, so a time beside them cannot be measured")
        time.sleep(0.1)
        running = 0
        for child in psutil.Process(worker).children():
            with contextlib.suppress(ProcessLookupError):  # ended meanwhile
                running += os.getsid(child.pid) == child.pid


def _in_turns(workspace: Path, model: str, versions: list[str], *, worker: int | None = None) -> dict[str, Any]:
    uri = f"sqlite:///{workspace / '.visionloop' / 'mlflow.db'}"
    ours, bare = [], []
    # The first of each still fills caches. It goes to the older version: the newer one was promoted last.
    for number in range(RUNS + 1):
        target = versions[number % 2]
        if worker is not None:
            _wait_for_two(worker)
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
