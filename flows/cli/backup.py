"""Backup and restore on the command line."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from components.contracts.wording import counted
from flows.cli.answers import HERE, AsJson, Commands, InWorkspace, finish


def add_backup_commands(app: Commands) -> None:
    """Put `backup` and `restore` on the command line."""
    app.command()(backup)
    app.command()(restore)


def backup(
    file: Annotated[Path, typer.Argument(help="Where; one .tar file.")],
    with_artefacts: Annotated[
        bool,
        typer.Option("--with-artefacts", help="Also the bytes of models, releases, store, windows and prediction log."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Write the workspace's tables, routes, settings and git history into one file, while it is in use."""
    from flows.workspace.backup import backup as write
    from flows.workspace.settings import prepare_environment
    from flows.workspace.workspace import Workspace

    found = Workspace.find(workspace)
    prepare_environment(found.state)
    manifest = write(found, file, with_artefacts=with_artefacts, force=force)
    lines = [f"{file}: {_amount(manifest['files'])}{_rows(manifest)}.", *_absent(manifest)]
    lines.append(
        f"Next: visionloop restore {shlex.quote(str(file))} --into DIR, somewhere else, to see that it holds what you need."
    )
    finish(_told(manifest) | {"file": str(file.absolute())}, json_, lambda: "\n".join(lines))


def restore(
    file: Annotated[Path, typer.Argument(help="A file that `visionloop backup` wrote.")],
    into: Annotated[
        Path | None, typer.Option("--into", help="An empty or a new folder; one named after the file by default.")
    ] = None,
    json_: AsJson = False,
) -> None:
    """Make the workspace of a backup in an empty place. Exit status 1 when something in it does not verify there."""
    from flows.workspace.backup import restore as make

    done = make(file, into if into is not None else HERE.absolute() / file.name.split(".")[0])
    lines = [f"{done.root}: {_amount(done.manifest['files'])}{_rows(done.manifest)}, every one verified."]
    lines += [*(f"Problem: {problem}" for problem in done.problems), *_absent(done.manifest)]
    if done.manifest["listed"]:
        lines.append(
            f"Those lay in {done.manifest['workspace']}/.visionloop: copy them to {done.root}/.visionloop, then check them "
            f"with visionloop store verify, reconcile and predictions verify."
        )
    lines.append(f"Next: cd {shlex.quote(str(done.root))} && visionloop data pull, visionloop reconcile, visionloop up")
    answer = _told(done.manifest) | {"workspace": str(done.root), "problems": done.problems}
    finish(answer, json_, lambda: "\n".join(lines))
    if done.problems:
        raise typer.Exit(1)


def _told(manifest: dict[str, Any]) -> dict[str, Any]:
    sizes = {part: [len(manifest[part]), sum(entry["bytes"] for entry in manifest[part])] for part in ("files", "listed")}
    return {
        "files": sizes["files"][0],
        "bytes": sizes["files"][1],
        "listed_files": sizes["listed"][0],
        "listed_bytes": sizes["listed"][1],
        "ledger": manifest["ledger"],
        "git_commit": manifest["git_commit"],
        "elsewhere": manifest["elsewhere"],
    }


def _amount(entries: list[dict[str, Any]]) -> str:
    return f"{counted(len(entries), 'file')}, {sum(e['bytes'] for e in entries) / 1e6:.1f} MB"


def _rows(manifest: dict[str, Any]) -> str:
    return f", the ledger to row {manifest['ledger']['rows']}" if manifest["ledger"] else ""


def _absent(manifest: dict[str, Any]) -> list[str]:
    lines = [f"Not in it: {name}: {advice}." for name, advice in manifest["elsewhere"].items()]
    lines.append("Not in it: the pictures of data/ (visionloop data push keeps them), and secrets.")
    if manifest["listed"]:
        lines.append(
            f"Listed by digest only: {_amount(manifest['listed'])} of models, releases, store, windows and log; nothing can "
            f"be served without them. Keep them elsewhere, or use --with-artefacts."
        )
    return lines
