"""What the tests share: quiet libraries, small real pictures, one workspace and one Prefect server per session."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import postgres as postgres_server
import pytest
from shapes import free_port, make_workspace, visionloop

from components import collector, plugins
from flows.workspace.settings import prepare_environment

# A shell starts what it puts in the background deaf to Ctrl-C, and what a test starts and stops would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# With torch, Prefect and MLflow in one process a look through all objects takes a second: 43 of 1,161 s, measured.
collector.collect_seldom()
collector.skip_at_exit()
# Where a test says that MLflow is away it is away for good.
os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
_STATE = Path(os.environ.get("TMPDIR", "/tmp")) / f"visionloop-tests-{os.getpid()}"
prepare_environment(_STATE)
# The server of the session is gone before the last log line would be sent.
os.environ["PREFECT_LOGGING_TO_API_ENABLED"] = "false"
# Hypothesis keeps tables of its own in the working directory otherwise.
os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(_STATE / "hypothesis")


def pytest_collection_finish() -> None:
    """Prefect reads its settings once: imported before the session's server is there, it would talk to one of its own."""
    if "prefect" in sys.modules:
        raise pytest.UsageError("a test module imports Prefect while it is collected; import it inside the test")


@pytest.fixture(scope="session", autouse=True)
def _clean_up() -> Iterator[None]:
    before = _working_directory()
    yield
    shutil.rmtree(_STATE, ignore_errors=True)
    assert _working_directory() == before, "a test wrote into the working directory"


def _working_directory() -> list[str]:
    """What lies there, but for the environments of converters and of the benchmarks' peers, which are kept, and uv's."""
    return sorted(path.name for path in Path.cwd().iterdir() if path.name != ".uv" and not path.name.startswith(".venv-"))


@pytest.fixture(autouse=True)
def _no_plugins_of_another_test() -> Iterator[None]:
    """A process looks into the workspace that its command found until it ends; here the next test would look there too."""
    yield
    plugins.use_workspace(None)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with data and nothing run in it; copy it, never use it."""
    return make_workspace(tmp_path_factory.mktemp("pristine") / "workspace")


@pytest.fixture
def workspace(pristine: Path, tmp_path: Path) -> Path:
    """A workspace of one's own."""
    return Path(shutil.copytree(pristine, tmp_path / "workspace", symlinks=True))


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """API address of a Prefect server of the session's own."""
    port, home = free_port(), tmp_path_factory.mktemp("prefect")
    with (home / "server.log").open("w") as log_file:
        server = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, "PREFECT_HOME": str(home), "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2"},
            stdout=log_file,
            stderr=subprocess.STDOUT,
        )
    try:
        api = f"http://127.0.0.1:{port}/api"
        _wait_for(f"{api}/health", server, home / "server.log")
        # Before Prefect is imported anywhere in this process: it reads its settings once.
        os.environ["PREFECT_API_URL"] = api
        yield api
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            told = log.read_text()
            assert server.poll() is None, f"the Prefect server died:\n{told}"
            assert time.monotonic() < deadline, f"the Prefect server did not answer:\n{told}"
            time.sleep(0.2)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Path:
    """A workspace in which the smoke recipe ran once through the command line; read it, or copy it."""
    root = make_workspace(tmp_path_factory.mktemp("trained") / "workspace")
    done = visionloop("train", "-r", "smoke", "--json", cwd=root)
    assert done.returncode == 0, done.stderr + done.stdout
    (root / "summary.json").write_text(done.stdout.strip().splitlines()[-1])
    return root


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a throw-away PostgreSQL server."""
    with postgres_server.server(tmp_path_factory.mktemp("pg")) as url:
        yield url
