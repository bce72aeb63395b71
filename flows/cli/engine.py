"""Engines on the command line: one that leaves the workspace, and whether one that came is what it should be."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components.contracts.wording import counted
from flows.cli.answers import HERE, AsJson, Commands, InWorkspace, OfModel, finish

if TYPE_CHECKING:
    from flows.workspace.engines import Verified

engine_app = Commands(help="Engines of registered versions, for machines without visionloop.")


@engine_app.command("bundle")
def engine_bundle(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where: a new folder, or a new file that ends in .zip.")],
    version: Annotated[str | None, typer.Argument(help="Version of the model; the champion by default.")] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", help="Such as onnxruntime-fp32; the one that serves by default.")
    ] = None,
    signing_key: Annotated[
        Path | None, typer.Option("--signing-key", help="A private elliptic key in PEM; the workspace's own by default.")
    ] = None,
    model: OfModel = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Write an engine with labels, preprocessing, golden pictures, licences and a program that runs it, signed.

    Its golden pictures are pictures of your data: look whether they may leave with it.
    """
    from flows.workspace.desk import desk
    from flows.workspace.engines import bundle_engine
    from flows.workspace.settings import prepare_environment
    from flows.workspace.workspace import Workspace

    prepare_environment(Workspace.find(workspace).state)  # before MLflow is imported by anything
    made = bundle_engine(desk(workspace, model), version, engine, out, key=signing_key)
    record = made.record
    answer = {
        "bundle": str(out),
        "model": record.model,
        "version": record.version,
        "standing": record.standing,
        "engine": record.engine.name,
        "bytes": made.num_bytes,
        "golden": len(record.golden),
        "signer": made.signer,
        "public_key": str(made.public_key) if made.public_key else None,
    }
    key = shlex.quote(str(made.public_key)) if made.public_key else "PUBLIC_KEY"
    lines = [
        f"{out}: engine {record.engine.name} of {record.model} version {record.version} ({record.standing}), "
        f"{made.num_bytes / 1e6:.1f} MB, with {counted(len(record.golden), 'golden picture')} of your data.",
        f"Signed by the key {made.signer[:16]}." + (f" Give others {made.public_key}." if made.public_key else ""),
        f"Next: visionloop engine verify {shlex.quote(str(out))} --key {key}; or, there: python predict.py PICTURE",
    ]
    finish(answer, json_, lambda: "\n".join(lines))


@engine_app.command("verify")
def engine_verify(
    bundle: Annotated[Path, typer.Argument(help="A folder or a .zip that `visionloop engine bundle` wrote.")],
    key: Annotated[
        Path | None, typer.Option("--key", help="The public key of who made it, from a place that you trust.")
    ] = None,
    json_: AsJson = False,
) -> None:
    """Compare a bundle with its manifest and signature, then run its golden pictures. Exit status 1 when it is not right.

    Without --key nothing shows who made it: only that it is as its maker left it.
    """
    from flows.workspace.engines import verify_engine
    from flows.workspace.settings import num_threads

    found = verify_engine(bundle, key=key, num_threads=num_threads())
    finish(_answer(bundle, found), json_, lambda: "\n".join(_told(bundle, found)))
    if found.problem:
        raise typer.Exit(1)


def _answer(bundle: Path, found: Verified) -> dict[str, Any]:
    record, answered = found.record, found.answered
    return {
        "bundle": str(bundle),
        "verified": not found.problem,
        "problem": found.problem,
        "origin_proven": found.origin_proven,
        "signer": found.signer,
        "model": record.model if record else None,
        "version": record.version if record else None,
        "engine": record.engine.name if record else None,
        "built_by": record.engine.runtime if record else None,
        "files": found.num_files,
        "bytes": found.num_bytes,
        "golden": {
            "pictures": answered.pictures,
            "pixel_difference": answered.pixel_difference,
            "logit_difference": answered.logit_difference if answered.logit_difference < float("inf") else None,
            "tolerance": answered.tolerance,
            "runtime": answered.runtime,
        }
        if answered
        else None,
    }


def _told(bundle: Path, found: Verified) -> list[str]:
    record, answered = found.record, found.answered
    if record is None or answered is None:
        return [found.problem]
    lines = [
        f"{bundle}: engine {record.engine.name} of {record.model} version {record.version}, "
        f"{counted(found.num_files, 'file')}, {found.num_bytes / 1e6:.1f} MB, as they were signed."
    ]
    if found.problem:
        return [*lines, f"NOT as it should be: {found.problem}"]
    lines.append(
        f"{counted(answered.pictures, 'golden picture')} answered as they should be by {answered.runtime}: a logit differs "
        f"by at most {answered.logit_difference:.2g}, accepted are {answered.tolerance:.2g}."
    )
    if found.origin_proven:
        lines.append(f"Signed by the key that you named ({found.signer[:16]}).")
    else:
        lines.append(
            f"Who made it is NOT shown: it is signed by the key {found.signer[:16]}, which came with it. Name the maker's "
            f"public key by --key."
        )
    return lines
