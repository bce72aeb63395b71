"""Serving on the command line: serve, ask a folder, and the prediction log."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.contracts import ConfigError
from flows.answering import HERE, AsJson, InWorkspace, finish, guarded

if TYPE_CHECKING:
    from serving.auth import Tokens

token_app = typer.Typer(no_args_is_help=True, help="Who may ask a server.", rich_markup_mode=None)


def add_serving_commands(app: typer.Typer) -> None:
    """Put the serving commands on the command line."""
    app.command()(serve)
    app.add_typer(token_app, name="token")


def serve(
    model: Annotated[list[str] | None, typer.Option("--model", "-m", help="A model to serve. May be repeated.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's own need tokens.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="HTTP port; 0 for any free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=-1, max=65535, help="gRPC port; 0 for any free one, -1 for none.")] = 8001,
    require_token: Annotated[bool, typer.Option(help="Ask for tokens on loopback too.")] = False,
    lanes: Annotated[int | None, typer.Option(min=1, max=256, help="Batches at once; the cores by default.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=64, help="Most pictures of a batch.")] = 8,
    batch_delay_ms: Annotated[
        float, typer.Option(min=0, max=1000, help="Wait for a fuller batch while a lane is free.")
    ] = 0,
    max_wait_ms: Annotated[float, typer.Option(min=1, help="Longest expected wait at which a picture is taken.")] = 500,
    max_queue: Annotated[int, typer.Option(min=1, help="Most pictures that wait.")] = 256,
    max_body_mb: Annotated[int, typer.Option(min=1, max=1024, help="Largest request.")] = 16,
    capture_share: Annotated[float, typer.Option(min=0, max=1, help="Share of the images whose bytes are kept.")] = 0.0,
    retain_days: Annotated[float, typer.Option(min=0, help="How long kept images stay.")] = 30.0,
    refresh_s: Annotated[float, typer.Option(min=0.05, help="How often the routes are looked at.")] = 2.0,
    workspace: InWorkspace = HERE,
) -> None:
    """Serve the champion: picture upload and the Open Inference Protocol, over HTTP and gRPC.

    A new champion is picked up without restart; the registry may be away. Stops with SIGTERM or Ctrl-C, when every request
    that was taken is answered.
    """

    def action() -> None:
        from flows.run import Workspace
        from flows.settings import read_settings
        from serving.captures import CaptureConfig
        from serving.deployment import Limits
        from serving.routing import Following
        from serving.server import ServingConfig
        from serving.server import serve as run

        found = Workspace.find(workspace)
        settings = read_settings(found.state)
        if not model:
            raise ConfigError("name the model to serve: --model NAME (visionloop candidates shows it)")
        config = ServingConfig(
            models=tuple(dict.fromkeys(model)),
            releases_url=settings.releases_url,
            state=found.state / "serving",
            log_url=settings.predictions_url,
            host=host,
            port=port,
            grpc_port=None if grpc_port < 0 else grpc_port,
            require_token=require_token,
            max_body=max_body_mb << 20,
            plugins=found.plugins if found.plugins.is_dir() else None,
            limits=Limits(
                lanes=lanes or settings.num_threads,
                max_batch=max_batch,
                batch_delay_ms=batch_delay_ms,
                max_wait_ms=max_wait_ms,
                max_queue=max_queue,
            ),
            following=Following(refresh_s=refresh_s),
            captures=CaptureConfig(share=capture_share, retain_days=retain_days),
        )
        status = run(config, announce=lambda line: print(line, file=sys.stderr, flush=True))
        if status:
            raise typer.Exit(status)

    guarded(action, False)


def _tokens(workspace: Path) -> Tokens:
    from flows.run import Workspace
    from serving.auth import Tokens

    return Tokens(Workspace.find(workspace).state / "serving" / "tokens.json")


@token_app.command("add")
def token_add(
    name: Annotated[str, typer.Argument(help="Whose it is.")],
    role: Annotated[str, typer.Option(help="viewer, predictor or admin.")] = "predictor",
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Make a token. It is shown once; only its sha256 is kept."""

    def action() -> None:
        token = _tokens(workspace).issue(name, role)
        finish({"name": name, "role": role, "token": token}, json_, lambda: token)

    guarded(action, json_)


@token_app.command("list")
def token_list(workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """Names and roles."""

    def action() -> None:
        found = _tokens(workspace).names()
        finish({"tokens": found}, json_, lambda: "\n".join(f"{n:24} {r}" for n, r in found.items()) or "No tokens yet.")

    guarded(action, json_)


@token_app.command("revoke")
def token_revoke(
    name: Annotated[str, typer.Argument(help="Whose it was.")], workspace: InWorkspace = HERE, json_: AsJson = False
) -> None:
    """Make a token useless; a running server forgets it at once."""

    def action() -> None:
        _tokens(workspace).revoke(name)
        finish({"revoked": name}, json_, lambda: f"The token of {name} works no more.")

    guarded(action, json_)
