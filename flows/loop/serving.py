"""Serving a model's champion: by a server, or over a whole source at once. What serves is imported when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from components.contracts.errors import ConfigError
from components.contracts.progress import Progress, silent
from components.contracts.records import Stored
from components.contracts.releases import Release, Route
from flows.terminal import Say
from flows.workspace.settings import own_captures, read_settings
from flows.workspace.workspace import Workspace

if TYPE_CHECKING:
    from serving.batch import BatchConfig, Done, Inputs
    from serving.protocols.auth import Tokens


@dataclass(frozen=True)
class ServerOptions:
    """What a person may choose of a server; the rest is the workspace's."""

    models: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    """0 for any free one."""
    grpc_port: int | None = 8001
    """None for no gRPC."""
    require_token: bool = False
    lanes: int | None = None
    """Batches at once; the cores by default."""
    max_batch: int = 4
    batch_delay_ms: float = 0.0
    max_wait_ms: float = 500.0
    max_queue: int = 256
    max_body: int | None = None
    """Bytes of the largest request; by default the largest picture and 1 MB more, as a form is larger than its picture."""
    capture_share: float = 0.0
    retain_days: float = 30.0
    request_timeout_s: float = 15.0
    load_timeout_s: float = 120.0
    refresh_s: float = 2.0
    seal_s: float = 300.0


@dataclass(frozen=True)
class Batch:
    """Images that are asked of a champion, one row an image."""

    model: str
    route: Route
    release: Stored[Release]
    inputs: Inputs = field(repr=False)
    config: BatchConfig = field(repr=False)

    @property
    def num_images(self) -> int:
        return len(self.inputs.names)


def serve(workspace: Workspace, options: ServerOptions, *, announce: Say) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status. Raises ConfigError before anything is started."""
    from flows.loop.captures import is_same_folder
    from serving.engines.limits import Limits
    from serving.log.captures import CaptureConfig
    from serving.log.journal import JournalConfig
    from serving.routing import Following
    from serving.server import ServingConfig
    from serving.server import serve as run

    settings = read_settings(workspace.state)
    if not options.models:
        raise ConfigError("name the model to serve: --model NAME (visionloop candidates shows it)")
    config = ServingConfig(
        models=tuple(dict.fromkeys(options.models)),
        releases_url=settings.releases_url,
        state=workspace.state / "serving",
        log_url=settings.predictions_url,
        host=options.host,
        port=options.port,
        grpc_port=options.grpc_port,
        require_token=options.require_token,
        request_timeout_s=options.request_timeout_s,
        max_body=options.max_body or settings.accepted.max_bytes + (1 << 20),
        plugins=workspace.plugins,
        limits=Limits(
            accepted=settings.accepted,
            lanes=options.lanes or settings.num_threads,
            max_batch=options.max_batch,
            batch_delay_ms=options.batch_delay_ms,
            max_wait_ms=options.max_wait_ms,
            max_queue=options.max_queue,
            load_timeout_s=options.load_timeout_s,
        ),
        following=Following(refresh_s=options.refresh_s),
        journal=JournalConfig(rotate_s=options.seal_s),
        captures=CaptureConfig(
            share=options.capture_share,
            retain_days=options.retain_days,
            url="" if is_same_folder(str(own_captures(workspace.state)), settings.captures_url) else settings.captures_url,
        ),
    )
    return run(config, announce=announce)


def tokens(workspace: Workspace) -> Tokens:
    """Who may ask a server of this workspace."""
    from serving.protocols.auth import Tokens

    return Tokens(workspace.state / "serving" / "tokens.json")


def open_batch(workspace: Workspace, model: str, source: str, *, shard_size: int, embeddings: bool) -> Batch:
    """The images of a folder, a .parquet file or s3:// address, and the verified champion that will answer them.

    Raises ConfigError for a source without images or a model without a champion.
    """
    from components.releases import ReleaseStore
    from serving.batch import BatchConfig, open_inputs
    from serving.engines.limits import Limits

    settings = read_settings(workspace.state)
    inputs = open_inputs(source, largest=settings.accepted.max_bytes)
    store = ReleaseStore(settings.releases_url)
    routes = store.routes(model)
    if routes is None:
        raise ConfigError(f"{model} has no champion yet; promote one first (visionloop candidates)")
    route = routes.routes[0]
    release = store.fetch(model, route.release, cache=workspace.state / "serving" / "releases" / model)
    # A batch fills the engine, waits as long as it takes and has nobody to refuse.
    limits = Limits(lanes=settings.num_threads, max_queue=1 << 30, max_wait_ms=1e9, niceness=0, accepted=settings.accepted)
    config = BatchConfig(shard_size=shard_size, embeddings=embeddings, limits=limits, plugins=workspace.plugins)
    return Batch(model, route, release, inputs, config)


def predict(batch: Batch, out: str, *, progress: Progress = silent) -> Done:
    """Answer the images into shards under `out`, a folder or s3:// address; running again goes on with those missing.

    Raises ConfigError when `out` holds another batch, StoreError when no engine can answer.
    """
    from serving import batch as batches

    return batches.predict(batch.release, batch.route.version, batch.inputs, out, batch.config, progress=progress)
