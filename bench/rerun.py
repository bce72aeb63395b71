"""`visionloop train` when nothing changed, with a Prefect server up, against the first run: wall time of whole processes."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

RERUNS = 5


def run(data: Path | None, scratch: Path) -> dict[str, Any]:
    """Seconds of the no-op rerun of the digits demo (median of 5); `data` is not used."""
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
        command = [sys.executable, "-m", "flows", "demo", "--directory", str(scratch / "demo"), "--json"]
        times = []
        for _ in range(RERUNS + 2):
            start = time.perf_counter()
            subprocess.run(command, env={**os.environ, "PREFECT_API_URL": api}, check=True, capture_output=True)
            times.append(time.perf_counter() - start)
    finally:
        server.terminate()
        server.wait(30)
    # The first rerun still fills Python's and DVC's caches.
    first, reruns = times[0], times[2:]
    ours = statistics.median(reruns)
    return {
        "ours": round(ours, 2),
        "peers": {"first run": round(first, 1)},
        "ratio": round(first / ours, 1),
        "spread": [round(min(reruns), 2), round(max(reruns), 2)],
        "n": len(reruns),
        "unit": "seconds of wall time, server up",
    }
