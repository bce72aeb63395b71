"""The serving process: sockets first, then releases, then ready; and a stop that drops nothing that was taken."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from components import plugins
from components.addresses import is_loopback
from components.contracts.errors import ConfigError
from components.releases import ReleaseStore
from serving.engines.deployment import Deployment
from serving.engines.limits import Limits
from serving.inference import Inference
from serving.log.background import Background, sealer_of, sender_of
from serving.log.captures import CaptureConfig, Captures
from serving.log.journal import Journal, JournalConfig
from serving.metrics import Metrics, log, log_to_stderr
from serving.protocols.access import Access
from serving.protocols.auth import Tokens
from serving.protocols.connections import BoundedHttp
from serving.protocols.http import Http, HttpGate
from serving.routing import Following, Routed

_CODE = Path(__file__).resolve().parent.parent
_FOLDERS = re.compile(r"""(?<![\w:/.-])/(?:[^/\s'":;,()]+/)+""")


@dataclass(frozen=True)
class ServingConfig:
    """One server, completely."""

    models: tuple[str, ...]
    releases_url: str
    state: Path
    """The server's own folder: verified copies, journal, tokens."""
    log_url: str
    """Where sealed segments of the prediction log go."""
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = 8001
    """None for no gRPC."""
    require_token: bool = False
    """Ask for tokens on loopback too."""
    max_body: int = 16 << 20
    request_timeout_s: float = 15.0
    """How long a request may take to arrive."""
    max_connections: int = 2000
    drain_s: float = 30.0
    plugins: Path | None = None
    limits: Limits = field(default_factory=Limits)
    following: Following = field(default_factory=Following)
    journal: JournalConfig = field(default_factory=JournalConfig)
    captures: CaptureConfig = field(default_factory=CaptureConfig)


def serve(config: ServingConfig, *, announce: Callable[[str], None] = lambda _: None) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status. Raises ConfigError before anything is started."""
    tokens = Tokens(config.state / "tokens.json")
    required = config.require_token or not is_loopback(config.host)
    if required and not tokens.names():
        raise ConfigError(
            f"{config.host} is reachable by others and there is no token yet; make one first: "
            f"visionloop token add NAME --role predictor"
        )
    if not config.models:
        raise ConfigError("name at least one model to serve: --model NAME")
    plugins.use_workspace(config.plugins)
    sockets = [_bound(config.host, config.port)]
    if config.grpc_port is not None:
        sockets.append(_bound(config.host, config.grpc_port))
    ports = [bound.getsockname()[1] for bound in sockets]
    log_to_stderr()
    try:
        import uvloop

        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = uvloop.new_event_loop
    except ImportError:
        loop_factory = None
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(_Server(config, Access(tokens, required=required), announce).run(sockets, ports))


def _bound(host: str, port: int) -> socket.socket:
    """A socket that holds the port before anything is loaded; raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}. Choose another with --port or --grpc-port") from None
    return found


class _Server:
    def __init__(self, config: ServingConfig, access: Access, announce: Callable[[str], None]) -> None:
        self._config, self._access, self._announce = config, access, announce
        self._started = time.monotonic()
        self._stop: asyncio.Event | None = None
        self._routed: dict[str, Routed] = {}

    def _served(self) -> list[Deployment]:
        return [routed.deployment for routed in self._routed.values() if routed.deployment is not None]

    async def run(self, sockets: list[socket.socket], ports: list[int]) -> int:
        config = self._config
        self._stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        metrics = Metrics()
        sealer = sealer_of(config.state / "journal", config.log_url)
        self._journal = Journal(config.state / "journal", config.journal, metrics, rotated=sealer.wake)
        self._journal.start()  # before anything is sealed: on a full disk it goes on in what another server left
        sealer.wake()
        captures = Captures(config.state / "captures", config.captures, metrics)
        captures.start()  # also when nothing is kept any more: what was kept grows old
        sender = sender_of(config.state / "captures", config.captures)
        if sender is not None:
            sender.wake()
        store = ReleaseStore(config.releases_url)
        self._routed = {
            model: Routed(
                model,
                store=store,
                state=config.state,
                limits=config.limits,
                following=config.following,
                metrics=metrics,
                plugins=config.plugins,
                served=self._served,
            )
            for model in config.models
        }
        self._inference = Inference(self._routed, self._journal, captures, metrics)
        http = self._http(ports)
        serving = loop.create_task(http._serve([sockets[0]]))
        grpc_server = await self._grpc(sockets[1]) if len(sockets) > 1 else None
        # What is there now stays: a collection would look at all of it, 60 ms in which nobody is answered or refused.
        gc.collect()
        gc.freeze()
        following = [loop.create_task(routed.follow()) for routed in self._routed.values()]
        announcing = loop.create_task(self._announce_ready(ports))
        stopped = loop.create_task(self._stop.wait())
        await asyncio.wait({stopped, serving}, return_when=asyncio.FIRST_COMPLETED)
        return await self._drain(http, serving, grpc_server, [*following, announcing, stopped], captures, sealer, sender)

    def _http(self, ports: list[int]) -> uvicorn.Server:
        config = self._config
        application = Http(
            self._inference, self._access, max_body=config.max_body, status=lambda: self._status(ports)
        ).application()
        gate = HttpGate(self._inference, max_body=config.max_body, request_timeout_s=config.request_timeout_s)
        protocol = type("Http", (BoundedHttp,), {"gate": gate})
        return uvicorn.Server(
            uvicorn.Config(
                application,
                http=protocol,
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=config.max_connections,
                timeout_keep_alive=60,
                timeout_graceful_shutdown=round(config.drain_s),
                backlog=2048,
            )
        )

    async def _grpc(self, bound: socket.socket) -> Any:
        import grpc

        from serving.protocols.grpc import Grpc

        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", self._config.max_body),
                ("grpc.so_reuseport", 0),
            ],
            # Each may hold a whole message before anything of ours sees it.
            maximum_concurrent_rpcs=128,
        )
        answers = Grpc(
            self._inference,
            self._access,
            request_timeout_s=self._config.request_timeout_s,
            max_body=self._config.max_body,
        )
        server.add_generic_rpc_handlers(answers.handlers())
        host, port = bound.getsockname()[:2]
        bound.close()  # gRPC binds by itself; until here the socket proved that the port is free
        shown = f"[{host}]" if ":" in host else host
        try:
            server.add_insecure_port(f"{shown}:{port}")
        except RuntimeError:
            raise ConfigError(f"cannot listen on {shown}:{port} for gRPC; choose another with --grpc-port") from None
        await server.start()
        return server

    async def _announce_ready(self, ports: list[int]) -> None:
        told: dict[str, str | None] = {}
        while not self._inference.ready:
            for routed in self._routed.values():
                if routed.problem and told.get(routed.model) != routed.problem:
                    told[routed.model] = routed.problem
                    self._announce(f"waiting: {routed.problem}")
            await asyncio.sleep(0.05)
        shown = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        seconds = time.monotonic() - self._started
        for routed in self._routed.values():
            self._announce(f"{routed.model} version {routed.current.version} answers after {seconds:.1f} s")
        also = f", gRPC on {shown}:{ports[1]}" if len(ports) > 1 else ""
        self._announce(f"ready: http://{shown}:{ports[0]} (POST a picture to /predict; pages at /docs){also}")
        grpc_port = ports[1] if len(ports) > 1 else None
        log("ready", seconds=round(seconds, 3), port=ports[0], grpc_port=grpc_port, frozen_objects=gc.get_freeze_count())

    def _without_folders(self, problem: str | None) -> str | None:
        """A problem as everybody who may look is told it: the log has the places of files, this has their names."""
        if not problem:
            return None
        config = self._config
        known = (
            config.releases_url,
            config.log_url,
            config.captures.url,
            str(config.state),
            str(config.state.parent.parent),
            str(_CODE),
            sys.prefix,
        )
        for folder in sorted((place.rstrip("/") for place in known), key=len, reverse=True):
            if folder.startswith("/"):  # also one whose name has spaces
                problem = problem.replace(f"{folder}/", "").replace(folder, Path(folder).name)
        return _FOLDERS.sub("", problem)

    def _status(self, ports: list[int]) -> dict[str, Any]:
        models = {}
        for model, routed in self._routed.items():
            deployment = routed.deployment
            models[model] = {
                "ready": routed.ready,
                "problem": self._without_folders(routed.problem),
                "version": deployment.version if deployment else None,
                "release": deployment.digest if deployment else None,
                "engine": deployment.release.engine.name if deployment else None,
                "generation": deployment.generation if deployment else None,
                "waiting": deployment.num_waiting if deployment else 0,
                "threshold": deployment.release.decision.threshold if deployment else None,
                "class_thresholds": deployment.release.decision.class_thresholds if deployment else {},
            }
        return {
            "ready": self._inference.ready,
            "models": models,
            "journal_problem": self._without_folders(self._journal.problem),
            "uptime_s": round(time.monotonic() - self._started, 1),
        }

    async def _drain(
        self,
        http: uvicorn.Server,
        serving: asyncio.Task[None],
        grpc_server: Any,
        tasks: list[asyncio.Task[Any]],
        captures: Captures,
        sealer: Background,
        sender: Background | None,
    ) -> int:
        config = self._config
        log("stopping", drain_s=config.drain_s)
        self._inference.draining = True  # not ready any more; what comes all the same is still answered
        for task in tasks:
            task.cancel()
        http.should_exit = True
        stopping = [serving]
        if grpc_server is not None:
            stopping.append(asyncio.ensure_future(grpc_server.stop(config.drain_s)))
        done, pending = await asyncio.wait(stopping, timeout=config.drain_s + 5)
        await asyncio.gather(*(routed.close(drain_s=1.0) for routed in self._routed.values()))
        await asyncio.to_thread(self._journal.close)
        await asyncio.to_thread(captures.close)
        await asyncio.gather(*(asyncio.to_thread(task.close, 20.0) for task in (sealer, sender) if task is not None))
        if self._journal.uncounted:
            log("predictions were lost and no file tells of them", level=logging.ERROR, lost_rows=self._journal.uncounted)
        for task in done:
            with contextlib.suppress(asyncio.CancelledError):
                if task.exception() is not None:
                    log("server failed", level=logging.ERROR, problem=str(task.exception()))
                    return 1
        complete = not pending and not self._journal.uncounted
        log("stopped", complete=complete)
        return 0 if complete else 1
