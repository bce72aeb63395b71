"""The second half of the demo: a second person approves, the release goes live, and the world's pictures are answered.

Everything goes through what a user has: the ledger's rules, the promote flow, `visionloop serve` in a process of its own,
HTTP requests, and the prediction log. The pictures are the 1,000 digits that are in no data version.
"""

from __future__ import annotations

import http.client
import io
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from components import plugins
from components.contracts import VisionloopError
from components.tasks.classification import wilson
from flows.deciding import desk
from flows.evidence import estimate_json
from flows.run import Workspace
from registry import approval

APPROVER = "demo-approver"
_REQUESTS = 400


def go_live(workspace: Workspace, version: str, model: str, *, told: Callable[[str], None]) -> dict[str, Any]:
    """Approve, promote, serve and ask; returns what came of it. Doing it again takes up where an earlier demo stopped."""
    from flows.promote import promote

    found = desk(workspace.root, model)
    state = approval.state_of(found.ledger.entries(model), version, found.ledger.now())
    if state.status in ("waiting", "expired"):
        by = approval.person(APPROVER)
        rule = approval.approve(version, by, "demo: the gates passed and the report was read")
        entry = found.ledger.decide(model=model, actor=by, rule=rule)
        told(f"approved by {by.name}, who is not {state.requested.actor.name}, the requester (ledger row {entry.seq})")
    promote(version, model, str(workspace.root), quiet=True)
    told(f"version {version} is champion: release published, ledger, routes and MLflow's alias read back")
    world = _pictures(workspace)
    with _server(workspace, model, told) as port:
        told(f"asking {_REQUESTS} pictures that are in no data version, over HTTP")
        asked = _ask(port, world[:: max(1, len(world) // _REQUESTS)][:_REQUESTS])
        status, refusal = _post(port, b"this is no picture")
        told(f"a file that is no picture: {status} {refusal['error']}")
    done = subprocess.run(
        [sys.executable, "-m", "flows", "predictions", "verify", "--json"],
        cwd=workspace.root,
        capture_output=True,
        text=True,
        check=False,
    )
    log = json.loads(done.stdout.strip().splitlines()[-1])
    told(f"prediction log: {log['rows']} rows in {log['segments']} sealed segments, {log['lost_rows']} lost")
    return {"approved_by": APPROVER, "champion": version, **asked, "log_rows": log["rows"], "log_lost": log["lost_rows"]}


def _pictures(workspace: Workspace) -> list[tuple[str, bytes]]:
    folder = workspace.cache / "world"
    if not folder.exists():
        plugins.load("sources", "digits").fetch_world(out=folder)
    found = []
    for path in sorted(folder.rglob("*.bmp"), key=lambda p: p.name):
        data = io.BytesIO()
        Image.open(path).save(data, "PNG")
        found.append((path.parent.name, data.getvalue()))
    return found


@contextmanager
def _server(workspace: Workspace, model: str, told: Callable[[str], None]) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    log = workspace.state / "serving.log"
    command = [sys.executable, "-m", "flows", "serve", "-m", model, "--port", str(port), "--grpc-port", "-1"]
    started = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=workspace.root, stdout=stream, stderr=stream)
    try:
        while not _ready(port):
            if process.poll() is not None or time.monotonic() - started > 60:
                raise VisionloopError(f"the server did not become ready; its log is {log}:\n{_tail(log)}")
            time.sleep(0.05)
        told(f"the server answers after {time.monotonic() - started:.1f} s, without torch (pages at /docs while it runs)")
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
    told(f"SIGTERM: drained, exit status {status}")


def _tail(path: Path) -> str:
    return "\n".join(path.read_text().splitlines()[-5:])


def _ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _post(port: int, data: bytes) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", "/predict", data, {"content-type": "image/png"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def _ask(port: int, pictures: list[tuple[str, bytes]]) -> dict[str, Any]:
    right = unsure = answered = 0
    elapsed = []
    for label, data in pictures:
        start = time.perf_counter()
        status, told = _post(port, data)
        elapsed.append((time.perf_counter() - start) * 1e3)
        if status != 200:
            raise VisionloopError(f"the server answered {status}: {told.get('error')}")
        right += told["predicted"] == label
        unsure += told["unsure"]
        answered += not told["unsure"] and told["label"] == label
    accuracy = wilson(right, len(pictures))
    sure = wilson(answered, len(pictures) - unsure) if unsure < len(pictures) else None
    ordered = sorted(elapsed)
    return {
        "requests": len(pictures),
        "accuracy": estimate_json(accuracy),
        "unsure": unsure,
        "accuracy_when_sure": estimate_json(sure) if sure is not None else None,
        "latency_p50_ms": ordered[len(ordered) // 2],
        "latency_p99_ms": ordered[int(len(ordered) * 0.99)],
    }
