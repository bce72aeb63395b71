"""A Ray cluster of this machine alone, which Ray's own tools start for a test."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from shapes import free_port


@contextmanager
def ray_head(log: Path, *, num_cpus: int = 4) -> Iterator[str]:
    """Its address; all of it is gone afterwards."""
    port = free_port()
    folder = Path("/tmp") / f"ray-{port}"  # the paths of its sockets may not be long
    environment = {**os.environ, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    command += [f"--num-cpus={num_cpus}", "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}"]
    command += ["--object-store-memory=80000000"]
    with log.open("w") as written:
        head = subprocess.Popen(command, env=environment, stdout=written, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        until = time.monotonic() + 240
        while "runtime started" not in log.read_text():
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.5)
        yield f"127.0.0.1:{port}"
    finally:
        family = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
        head.send_signal(signal.SIGTERM)
        psutil.wait_procs(family, timeout=30)
        for process in family:
            if process.is_running():
                process.kill()
        head.kill()
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)
