"""`visionloop up`: the processes that stay. A Prefect server and a worker, on loopback, with a credential of their own.

    .visionloop/up/auth          the server's credential, readable by its owner alone
    .visionloop/up/server.json   pid, when that process began, address
    .visionloop/up/worker.json
    .visionloop/up/*.log         what they say

A PID may be reused, so a process is identified by PID and start time. Its file tells which folder it was started in: in a
copy of a workspace it tells of a process of the original, which is none of the copy's.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from components.contracts.errors import ConfigError, VisionloopError, WorkspaceBusy
from components.store import write_atomically
from flows.terminal import Say
from flows.workspace.settings import (
    UP,
    Settings,
    basic,
    began,
    environment_with,
    identity,
    is_of,
    sqlite_url,
    use_environment,
)
from flows.workspace.workspace import Workspace

PORT = 4200
_START_S = 180.0
_STOP_S = 20.0


@dataclass(frozen=True)
class Standing:
    """One process that stays."""

    name: str
    pid: int
    api: str


class Up:
    """What `visionloop up` keeps running for a workspace."""

    def __init__(self, workspace: Workspace, settings: Settings) -> None:
        self.workspace, self._settings = workspace, settings
        self.folder = workspace.state / UP

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One `up` or `down` at a time; raises WorkspaceBusy. Where nothing can be written, nothing is started."""
        if not os.access(self.folder if self.folder.is_dir() else self.workspace.state, os.W_OK):
            yield
            return
        self._make_folder()
        with (self.folder / "lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise WorkspaceBusy("another `visionloop up` or `down` is at work here; wait for it to end") from None
            yield

    def _make_folder(self) -> None:
        """The folder, for its owner alone; not made by who only looks, which a read-only disk allows."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.folder.chmod(0o700)

    @property
    def credential(self) -> str:
        """What the server asks for, `user:password`; made on first use."""
        path = self.folder / "auth"
        if not path.is_file():
            self._make_folder()
            write_atomically(path, f"visionloop:{secrets.token_urlsafe(24)}".encode())
            path.chmod(0o600)
        return path.read_text().strip()

    def process(self, name: str) -> Standing | None:
        """The running process of this name, None when there is none."""
        try:
            told = json.loads((self.folder / f"{name}.json").read_text())
            if began(told["pid"]) != told["began"] or not is_of(told, self.folder):
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return Standing(name, int(told["pid"]), str(told["api"]))

    def _elsewhere(self, name: str) -> bool:
        """Whether a running process was started when the workspace had another path."""
        try:
            place = json.loads((self.folder / f"{name}.json").read_text()).get("place")
        except (OSError, ValueError, AttributeError):
            return False
        return place not in (None, str(self.folder))

    def start(self, *, port: int | None, say: Say) -> Standing:
        """The server and the worker, where they do not run already. Raises ConfigError for a port that is taken."""
        server = self.process("server")
        foreign = self._settings.prefect_api_url
        if foreign and (server is None or foreign != server.api):
            raise ConfigError(
                f"PREFECT_API_URL names a Prefect server already ({foreign}). `visionloop deploy` makes the deployments "
                f"there; or unset it and run `visionloop up` again"
            )
        if server is not None and self._elsewhere("server"):
            say("the workspace was moved while this ran; what runs knows the old place")
            self.stop(say=say)
            server = None
        if server is None:
            server = self._start_server(port, say)
        else:
            say(f"the Prefect server runs already (pid {server.pid}, {server.api})")
            self._wait(server, say)
        use_environment(self.environment(server.api))
        return server

    def environment(self, api: str) -> dict[str, str]:
        """What a process needs to talk to the server."""
        return {"PREFECT_API_URL": api, "PREFECT_API_AUTH_STRING": self.credential}

    def _start_server(self, port: int | None, say: Say) -> Standing:
        chosen = _free(port if port is not None else PORT, fixed=port is not None)
        api = f"http://127.0.0.1:{chosen}/api"
        home = self.folder / "prefect"
        home.mkdir(exist_ok=True)
        own = self.environment(api) | {
            "PREFECT_HOME": str(home),
            "PREFECT_SERVER_API_AUTH_STRING": self.credential,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
            "PREFECT_LOGGING_LEVEL": "WARNING",
        }
        if self._settings.prefect_database_url:
            own["PREFECT_API_DATABASE_CONNECTION_URL"] = self._settings.prefect_database_url
        elif "file:" in sqlite_url(home):
            own["PREFECT_API_DATABASE_CONNECTION_URL"] = sqlite_url(home / "prefect.db", driver="aiosqlite")
        command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(chosen)]
        started = self._spawn("server", command, own, api)
        say(f"starting a Prefect server on 127.0.0.1:{chosen} (pid {started.pid}, log {self.folder / 'server.log'})")
        self._wait(started, say)
        return started

    def start_worker(self, server: Standing, pool: str, *, say: Say) -> Standing:
        """The worker that runs the deployments of this machine, where it does not run already."""
        running = self.process("worker")
        if running is not None and running.api == server.api:
            say(f"the worker runs already (pid {running.pid})")
            return running
        if running is not None:
            _end(running, say)  # one of an earlier server, at an address where nobody answers
        own = self.environment(server.api) | {
            "PREFECT_WORKER_QUERY_SECONDS": "3",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "PREFECT_LOGGING_LEVEL": "INFO",
            "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO",
        }
        # A training, and a watch or a promotion beside it; what is late waits its turn.
        command = ["flows.up.worker", pool, f"visionloop-{socket.gethostname()}", "2"]
        started = self._spawn("worker", command, own, server.api)
        if not give_way(started.pid):
            say("the system does not let the worker give way to other programs now; they share the processors equally")
        say(f"starting a worker (pid {started.pid}, log {self.folder / 'worker.log'})")
        return started

    def _spawn(self, name: str, command: list[str], own: Mapping[str, str], api: str) -> Standing:
        log = self.folder / f"{name}.log"
        with log.open("ab") as stream:
            process = subprocess.Popen(
                # -P: a folder of the workspace that is named as one of ours, or Prefect's, is not the one to import.
                [sys.executable, "-P", "-m", *command],
                cwd=self.workspace.root,
                env=environment_with(own),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        facts = {"pid": process.pid, "began": began(process.pid), "api": api}
        facts |= {"folder": identity(self.folder), "place": str(self.folder)}
        write_atomically(self.folder / f"{name}.json", json.dumps(facts).encode())
        return Standing(name, process.pid, api)

    def _wait(self, server: Standing, say: Say) -> None:
        begun = said = time.monotonic()
        while not healthy(server.api, self.credential):
            if self.process("server") is None:
                raise VisionloopError(
                    f"the Prefect server ended; its log is {self.folder / 'server.log'}:\n{self.tail('server')}"
                )
            if time.monotonic() - begun > _START_S:
                raise VisionloopError(
                    f"the Prefect server did not answer within {_START_S:g} s; its log is {self.folder / 'server.log'}. "
                    f"Stop it with `visionloop down` and try again"
                )
            if time.monotonic() - said > 10:
                said = time.monotonic()
                say(f"waiting for the Prefect server, {said - begun:.0f} s (its first start makes a database)")
            time.sleep(0.3)

    def tail(self, name: str, lines: int = 8) -> str:
        """The end of a process's log."""
        try:
            return "\n".join((self.folder / f"{name}.log").read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    def start_console(self, *, say: Say) -> str:
        """The console on loopback, where people look at candidates and decide; returns its address."""
        return self._page("console", (["flows", "console", "--workspace", str(self.workspace.root)], {}), 8400, say)

    def start_pages(self, *, say: Say) -> dict[str, str]:
        """MLflow's and Evidently's pages on loopback, for looking; returns their addresses.

        MLflow's ask for the credential that Prefect's do. Evidently's can be read by everybody on this machine, and written
        by nobody.
        """
        found = {"MLflow": self._settings.tracking_uri}
        if not self._settings.tracking_uri.startswith(("http://", "https://")):
            from flows.workspace.desk import artifacts_of

            # MLflow's pages of a copied workspace would show its original's files.
            artifacts_of(self.workspace, self._settings)
            found["MLflow"] = self._page("mlflow", self._mlflow(), 5000, say)
        history = self.workspace.state / "monitoring" / "evidently"
        history.mkdir(parents=True, exist_ok=True)
        evidently = ["evidently.cli", "ui", "--workspace", str(history), "--host", "127.0.0.1"]
        secret = {"EVIDENTLY_SECRET": secrets.token_urlsafe(24)}
        found["Evidently"] = self._page("evidently", (evidently, secret), 8001, say)
        return found

    def _mlflow(self) -> tuple[list[str], dict[str, str]]:
        user, _, password = self.credential.partition(":")
        config = self.folder / "mlflow-auth.ini"
        lines = [
            "[mlflow]",
            "default_permission = READ",
            f"database_uri = {sqlite_url(self.folder / 'mlflow-auth.db').replace('%', '%%')}",
            f"admin_username = {user}",
            f"admin_password = {password}",
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth",
        ]
        write_atomically(config, "\n".join([*lines, ""]).encode())
        config.chmod(0o600)
        command = ["mlflow", "server", "--app-name", "basic-auth", "--host", "127.0.0.1", "--workers", "1"]
        # In the environment: command lines are for everybody to see, and an address may hold a password.
        own = {
            "MLFLOW_BACKEND_STORE_URI": self._settings.tracking_uri,
            "MLFLOW_AUTH_CONFIG_PATH": str(config),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_urlsafe(32),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        return command, own

    def _page(self, name: str, how: tuple[list[str], dict[str, str]], port: int, say: Say) -> str:
        command, own = how
        running = self.process(name)
        if running is None:
            chosen = _free(port, fixed=False)
            running = self._spawn(name, [*command, "--port", str(chosen)], own, f"http://127.0.0.1:{chosen}")
            say(f"starting the pages of {name} on {running.api} (pid {running.pid})")
        return running.api

    def addresses(self) -> dict[str, str]:
        """Pages that are there to look at now."""
        names = {"console": "Console", "server": "Prefect", "mlflow": "MLflow", "evidently": "Evidently"}
        running = {shown: self.process(name) for name, shown in names.items()}
        return {shown: found.api.removesuffix("/api") for shown, found in running.items() if found is not None}

    def stop(self, *, say: Say) -> list[str]:
        """End the worker, then the server; returns what was ended. Runs that the worker started end with it."""
        ended = []
        for name in ("console", "evidently", "mlflow", "worker", "server"):
            running = self.process(name)
            if running is not None:
                _end(running, say)
                ended.append(name)
            with contextlib.suppress(OSError):  # of a disk that can only be read; the process that it names has ended
                (self.folder / f"{name}.json").unlink(missing_ok=True)
        return ended


def give_way(pid: int) -> bool:
    """Answers to people come before trainings and watches: a lower priority for a process that leads a session.

    What it starts inherits the priority; a session that is begun there does not (`flows.up.worker`). False where the system
    refused it for a second.
    """
    with contextlib.suppress(psutil.Error, OSError):
        psutil.Process(pid).nice(15)  # ten more than an engine (serving.engines.limits.Limits)
    # Linux shares the processors between sessions first (sched_autogroup), so the session has to give way too.
    for attempt in range(10):
        if attempt:
            time.sleep(0.11)
        try:
            Path(f"/proc/{pid}/autogroup").write_text("10")
        except BlockingIOError:
            continue  # without CAP_SYS_ADMIN the kernel takes one in a tenth of a second, of all users together
        except OSError:
            pass  # no sessions that compete here, or the process has ended
        return True
    return False


def _end(running: Standing, say: Say) -> None:
    """SIGTERM to a process and what it started, SIGKILL to what is left after a while."""
    try:
        process = psutil.Process(running.pid)
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return
    say(f"stopping the {running.name} (pid {running.pid})")
    with contextlib.suppress(psutil.Error):
        process.terminate()
    _, alive = psutil.wait_procs(family, timeout=_STOP_S)
    for left in alive:
        with contextlib.suppress(psutil.Error):
            left.kill()
    psutil.wait_procs(alive, timeout=5)


def healthy(api: str, credential: str) -> bool:
    """Whether the server answers, and takes this credential: a question that needs none would say less."""
    address = urlsplit(api)
    connection = http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port, timeout=3)
    try:
        connection.request("GET", f"{address.path}/admin/version", headers={"authorization": basic(credential)})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _free(port: int, *, fixed: bool) -> int:
    """The port, or where it was not asked for by number, the next free one."""
    for candidate in (port,) if fixed else range(port, port + 50):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", candidate))
                return candidate
            except OSError:
                continue
    raise ConfigError(f"port {port} on 127.0.0.1 is taken; name another with --port")
