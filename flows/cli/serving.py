"""Serving on the command line: serve, ask a folder, and the prediction log."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.contracts.errors import ConfigError
from components.contracts.wording import counted
from flows import stopping
from flows.cli.answers import HERE, AsJson, Commands, InWorkspace, finish, moment
from flows.terminal import to_stderr

if TYPE_CHECKING:
    from serving.protocols.auth import Tokens

predictions_app = Commands(help="The prediction log.")
token_app = Commands(help="Who may ask a server.")


def add_serving_commands(app: Commands) -> None:
    """Put the serving commands on the command line."""
    app.command()(serve)
    app.command()(predict)
    app.add_typer(token_app, name="token")
    app.add_typer(predictions_app, name="predictions")


def serve(
    model: Annotated[list[str] | None, typer.Option("--model", "-m", help="A model to serve. May be repeated.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's own need tokens.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="HTTP port; 0 for any free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=-1, max=65535, help="gRPC port; 0 for any free one, -1 for none.")] = 8001,
    require_token: Annotated[bool, typer.Option(help="Ask for tokens on loopback too.")] = False,
    lanes: Annotated[int | None, typer.Option(min=1, max=256, help="Batches at once; the cores by default.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=64, help="Most pictures of a batch.")] = 4,
    batch_delay_ms: Annotated[
        float, typer.Option(min=0, max=1000, help="Wait for a fuller batch while a lane is free.")
    ] = 0,
    max_wait_ms: Annotated[
        float, typer.Option(min=1, help="How long 99 % of the pictures should wait at most; longer queues are refused.")
    ] = 500,
    max_queue: Annotated[int, typer.Option(min=1, help="Most pictures that wait.")] = 256,
    max_body_mb: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Largest request; by default the largest picture and 1 MB more.")
    ] = None,
    capture_share: Annotated[float, typer.Option(min=0, max=1, help="Share of the images whose bytes are kept.")] = 0.0,
    retain_days: Annotated[float, typer.Option(min=0, help="How long kept images stay.")] = 30.0,
    request_timeout_s: Annotated[float, typer.Option(min=0.1, help="How long a request may take to arrive.")] = 15.0,
    load_timeout_s: Annotated[float, typer.Option(min=1, help="How long a release may work on being ready.")] = 120.0,
    refresh_s: Annotated[float, typer.Option(min=0.05, help="How often the routes are looked at.")] = 2.0,
    seal_s: Annotated[float, typer.Option(min=1, help="Age at which the journal becomes a segment of the log.")] = 300.0,
    workspace: InWorkspace = HERE,
) -> None:
    """Serve the champion: picture upload and the Open Inference Protocol, over HTTP and gRPC.

    A new champion is picked up without restart; the registry may be away. Stops with SIGTERM or Ctrl-C, when every request
    that was taken is answered.
    """
    from flows.loop.serving import ServerOptions
    from flows.loop.serving import serve as run
    from flows.workspace.workspace import Workspace

    options = ServerOptions(
        models=tuple(model or ()),
        host=host,
        port=port,
        grpc_port=None if grpc_port < 0 else grpc_port,
        require_token=require_token,
        lanes=lanes,
        max_batch=max_batch,
        batch_delay_ms=batch_delay_ms,
        max_wait_ms=max_wait_ms,
        max_queue=max_queue,
        max_body=max_body_mb << 20 if max_body_mb else None,
        capture_share=capture_share,
        retain_days=retain_days,
        request_timeout_s=request_timeout_s,
        load_timeout_s=load_timeout_s,
        refresh_s=refresh_s,
        seal_s=seal_s,
    )
    status = run(Workspace.find(workspace, to_serve=True), options, announce=to_stderr)
    if status:
        raise typer.Exit(status)


def _tokens(workspace: Path) -> Tokens:
    from flows.loop.serving import tokens
    from flows.workspace.workspace import Workspace

    return tokens(Workspace.find(workspace, to_serve=True))


@token_app.command("add")
def token_add(
    name: Annotated[str, typer.Argument(help="Whose it is.")],
    role: Annotated[str, typer.Option(help="viewer, predictor or admin.")] = "predictor",
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Make a token. It is shown once; only its sha256 is kept."""
    token = _tokens(workspace).issue(name, role)
    finish({"name": name, "role": role, "token": token}, json_, lambda: token)


@token_app.command("list")
def token_list(workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """Names and roles."""
    found = _tokens(workspace).names()
    finish({"tokens": found}, json_, lambda: "\n".join(f"{n:24} {r}" for n, r in found.items()) or "No tokens yet.")


@token_app.command("revoke")
def token_revoke(
    name: Annotated[str, typer.Argument(help="Whose it was.")], workspace: InWorkspace = HERE, json_: AsJson = False
) -> None:
    """Make a token useless; a running server forgets it at once."""
    _tokens(workspace).revoke(name)
    finish({"revoked": name}, json_, lambda: f"The token of {name} works no more.")


def predict(
    source: Annotated[str, typer.Argument(help="A folder, a .parquet file (column image or path), or s3://bucket/prefix.")],
    out: Annotated[
        str, typer.Option("--out", help="A folder or s3:// address for the shards; kept, so a second run resumes.")
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="The model whose champion answers.")],
    shard_size: Annotated[int, typer.Option(min=1, help="Images of a shard.")] = 2000,
    embeddings: Annotated[bool, typer.Option(help="Also write the embeddings.")] = False,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Answer every image of a source by the champion, one row an image; a bad image is an error row.

    Exit status 1 when an image got no answer.
    """
    from flows.loop.serving import open_batch
    from flows.loop.serving import predict as answer_all
    from flows.terminal import Console
    from flows.workspace.workspace import Workspace

    batch = open_batch(Workspace.find(workspace, to_serve=True), model, source, shard_size=shard_size, embeddings=embeddings)
    route = batch.route
    with (
        Console(1, quiet=json_) as console,
        stopping.at_once(lambda: "stopped; the same command goes on with the shards that are missing"),
        console.stage(f"predicting {counted(batch.num_images, 'image')}", 1) as (progress, _),
    ):
        done = answer_all(batch, out, progress=progress)
    facts = dataclasses.asdict(done) | {"refused": [{"name": name, "error": error} for name, error in done.refused]}
    answer = {"model": model, "version": route.version, "release": route.release, "out": out} | facts
    lines = [
        f"{counted(done.rows, 'row')} in {counted(done.shards, 'shard')} under {out} by {model} version {route.version}."
    ]
    lines += [f"{counted(done.resumed, 'shard')} there already."] if done.resumed else []
    lines += [f"{done.errors} of {counted(done.rows, 'image')} got no answer:"] if done.errors else []
    lines += [f"  {name}: {error}" for name, error in done.refused]
    lines += ["  ... and others; the column `error` has all of them"] if done.errors > len(done.refused) else []
    finish(answer, json_, lambda: "\n".join(lines))
    if done.errors:
        raise typer.Exit(1)


@predictions_app.command("export")
def predictions_export(
    out: Annotated[Path, typer.Argument(help="File to write: .parquet, .csv or .jsonl.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Of one model alone.")] = None,
    since: Annotated[str | None, typer.Option(help="From this moment on, ISO 8601, UTC unless it says otherwise.")] = None,
    until: Annotated[str | None, typer.Option(help="Before this moment.")] = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Write sealed predictions to one file; says what is missing or not sealed yet."""
    from flows.loop.predictions import export_predictions
    from flows.workspace.workspace import Workspace

    begin = moment("--since", since, past=True) if since else None
    end = moment("--until", until) if until else None
    if begin is not None and end is not None and begin >= end:
        raise ConfigError(f"--since {since!r} is not before --until {until!r}; nothing can lie between them")
    exported = export_predictions(Workspace.find(workspace, to_serve=True), out, model=model, since=begin, until=end)
    unsealed, lost = exported.unsealed_journals, exported.lost
    notes = f"; {counted(unsealed, 'journal')} still being written" if unsealed else ""
    notes += f"; {counted(lost, 'prediction')} lost when the journal could not be written" if lost else ""
    finish(
        {"rows": exported.rows, "lost": lost, "unsealed_journals": unsealed, "out": str(out)},
        json_,
        lambda: f"{counted(exported.rows, 'prediction')} in {out}{notes}",
    )


@predictions_app.command("verify")
def predictions_verify(workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """Check that every segment is as it was sealed, no prediction lost or there twice, and the kept images.

    Exit status 1 when not.
    """
    from flows.loop.predictions import verify_predictions
    from flows.workspace.workspace import Workspace

    verified = verify_predictions(Workspace.find(workspace, to_serve=True))
    found, erased, head = verified.log, verified.erased, verified.head
    lines = [
        f"{counted(found.segments, 'segment')}, {counted(found.rows, 'prediction')}, {found.duplicates} twice, "
        f"{found.lost_rows} lost"
    ]
    lines += [f"{counted(found.unsealed, 'journal')} still written or not sealed yet"] if found.unsealed else []
    lines += [f"{counted(erased, 'image')} erased, the last record is {head[:16]}"] if erased else []
    lines += [*map(str, found.losses), *found.broken, *verified.captures]
    told = {"captures": list(verified.captures), "erasures": {"count": erased, "head": head}}
    finish(dataclasses.asdict(found) | told, json_, lambda: "\n".join(lines))
    if not verified.is_whole:
        raise typer.Exit(1)


@predictions_app.command("erase")
def predictions_erase(
    image_sha256: Annotated[str, typer.Argument(help="sha256 of the image's bytes, as every prediction names it.")],
    as_: Annotated[str, typer.Option("--as", help="Who erases.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; kept as proof.")],
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Remove a kept image for good; it is never kept again. The predictions about it stay, without its bytes.

    Copies that became training data are named, not removed: data versions and the models of them rest on them.
    """
    from flows.loop.predictions import erase_image
    from flows.workspace.workspace import Workspace

    erased = erase_image(Workspace.find(workspace, to_serve=True), image_sha256, by=as_, reason=reason)
    record = erased.record
    was = "It was kept and is removed" if record["found"] else "It was not found, and will not be kept"
    lines = [f"{was}; recorded at {record['at']} as {record['hash'][:16]}."]
    lines += [
        f"It is training data as well: {copy}. Remove the file and run `visionloop data add`, for a version without it; "
        f"earlier versions keep it"
        for copy in erased.training_copies
    ]
    finish(record | {"training_copies": list(erased.training_copies)}, json_, lambda: "\n".join(lines))
