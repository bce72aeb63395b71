"""A throw-away PostgreSQL server for the tests that prove the same on both databases."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from shapes import free_port

POSTGRES = next((p for p in Path("/usr/lib/postgresql").glob("*/bin") if (p / "initdb").exists()), None)


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """URL of a throw-away PostgreSQL server; it refuses to run as root, so root starts it as user postgres."""
    if POSTGRES is None:
        pytest.skip("no PostgreSQL server is installed; its half of the ledger is then unproven here")
    port, prefix = free_port(), []
    if os.geteuid() == 0:
        prefix = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        folder = Path("/tmp") / f"visionloop-pg-{os.getpid()}"
        folder.mkdir()
        shutil.chown(folder, "postgres")
    data = folder / "data"

    def run(*arguments: str) -> None:
        subprocess.run([*prefix, *arguments], check=True, capture_output=True, cwd=folder)

    run(
        str(POSTGRES / "initdb"),
        "-D",
        str(data),
        "-U",
        "tester",
        "-A",
        "trust",
        "--no-sync",
        "-E",
        "UTF8",
        "--locale=C.UTF-8",
    )
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    run(str(POSTGRES / "pg_ctl"), "-D", str(data), "-w", "-l", str(folder / "log"), "-o", options, "start")
    yield f"postgresql+psycopg2://tester@127.0.0.1:{port}/postgres"
    run(str(POSTGRES / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop")
    shutil.rmtree(folder, ignore_errors=True)
