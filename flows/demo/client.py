"""The demo's server and the client that asks it."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.contracts.errors import VisionloopError
from components.intervals import wilson
from flows.demo.workspace import MODEL
from flows.demo.world import Picture
from flows.terminal import Say
from flows.training.results import estimate_json
from flows.workspace.settings import environment_with
from flows.workspace.workspace import Workspace


def command_line(workspace: Workspace, *arguments: str, accepted: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """A command of the product in a process of its own; its JSON answer."""
    done = subprocess.run(
        [sys.executable, "-m", "flows", *arguments, "--json"],
        cwd=workspace.root,
        env=environment_with({}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in accepted:
        raise VisionloopError(f"visionloop {' '.join(arguments)} failed:\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@contextmanager
def start_server(workspace: Workspace, say: Say) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    log = workspace.state / "serving.log"
    options = ["--port", str(port), "--grpc-port", "-1", "--capture-share", "1", "--seal-s", "5"]
    started = time.monotonic()
    with log.open("a") as stream:
        command = [sys.executable, "-m", "flows", "serve", "-m", MODEL, *options]
        process = subprocess.Popen(command, cwd=workspace.root, stdout=stream, stderr=stream)
    try:
        while not _ready(port):
            if process.poll() is not None or time.monotonic() - started > 60:
                raise VisionloopError(f"the server did not become ready; its log is {log}:\n{tail(log)}")
            time.sleep(0.05)
        say(f"  the server answers after {time.monotonic() - started:.1f} s, without torch")
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
    say(f"  SIGTERM: the server drained, exit status {status}")


def tail(path: Path) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-15:])
    except OSError:
        return ""


def _ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def post(port: int, data: bytes) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", "/predict", data, {"content-type": "image/png"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def ask(port: int, pictures: Sequence[Picture]) -> dict[str, Any]:
    """Ask for every picture, one after the other; accuracy with its interval, and what a request took."""
    right = unsure = sure_and_right = 0
    elapsed = []
    for picture in pictures:
        start = time.perf_counter()
        status, told = post(port, picture.data)
        elapsed.append((time.perf_counter() - start) * 1e3)
        if status != 200:
            raise VisionloopError(f"the server answered {status}: {told.get('error')}")
        right += told["predicted"] == picture.label
        unsure += told["unsure"]
        sure_and_right += not told["unsure"] and told["label"] == picture.label
    sure = len(pictures) - unsure
    ordered = sorted(elapsed)
    return {
        "requests": len(pictures),
        "accuracy": estimate_json(wilson(right, len(pictures))),
        "unsure": unsure,
        "accuracy_when_sure": estimate_json(wilson(sure_and_right, sure)) if sure else None,
        "latency_p50_ms": ordered[len(ordered) // 2],
        "latency_p99_ms": ordered[int(len(ordered) * 0.99)],
    }
