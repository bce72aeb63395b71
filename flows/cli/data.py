"""Commands about data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from components.contracts.errors import ConfigError
from components.contracts.wording import counted
from flows.cli.answers import HERE, AsJson, Commands, InWorkspace, finish

if TYPE_CHECKING:
    from flows.workspace.data import Added


data_app = Commands(help="Images and their pinned versions.")


@data_app.command("add")
def data_add(
    folder: Annotated[Path | None, typer.Argument(help="One sub-folder per class; none to pin data/ as it is.")] = None,
    source: Annotated[str | None, typer.Option(help="A source plug-in instead of a folder, such as digits.")] = None,
    from_predictions: Annotated[
        str | None, typer.Option(help="The model whose captured and labelled images of production are added.")
    ] = None,
    test_share: Annotated[
        float | None, typer.Option(min=0.05, max=0.5, help="Share that is test for ever; frozen by the first add.")
    ] = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Copy images into data/, freeze which of them are test, and pin the result as a new data version."""
    from flows.terminal import Console
    from flows.workspace import data
    from flows.workspace.settings import read_settings
    from flows.workspace.workspace import Workspace

    if sum(given is not None for given in (folder, source, from_predictions)) > 1:
        raise ConfigError("give a folder, --source or --from-predictions, one of them")
    if from_predictions is not None:
        _add_from_predictions(workspace, from_predictions, json_)
        return
    found = Workspace.find(workspace)
    accepted = read_settings(found.state).accepted
    with found.locked("visionloop data add"), Console(1, quiet=json_) as console:
        if source is not None:
            if found.data.exists():
                raise ConfigError(f"{found.data} exists already; --source fills an empty workspace")
            data.fetch(found, source)
        with console.stage("looking at images", 1) as (progress, _):
            added = data.add(found, folder, test_share=test_share, accepted=accepted, progress=progress)
    _finish_added(added, [], "then visionloop train --recipe NAME", json_)


def _finish_added(added: Added, notes: list[str], following: str, as_json: bool) -> None:
    from components.validation import ValidationConfig
    from flows.workspace import data

    notes = [*notes, *data.class_note(added.class_counts, ValidationConfig().min_images_per_class)]
    if added.refused:
        named = "; ".join(f"{name}: {why}" for name, why in list(added.refused.items())[:3])
        notes.append(f"not copied, no picture that is accepted: {counted(len(added.refused), 'file')} ({named})")
    if added.undecodable:
        shown = ", ".join(added.undecodable[:3])
        notes.append(f"{counted(len(added.undecodable), 'file')} cannot be decoded and will be quarantined: {shown}")
    others = [entry for entry in added.left_out if entry.file not in added.refused]
    for reason in dict.fromkeys(entry.reason for entry in others):
        files = [entry.file for entry in others if entry.reason == reason]
        shown = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
        notes.append(f"{len(files)} left out, {reason}: {shown}")
    answer = {
        "data_version": added.version.dvc_hash,
        "files": added.version.num_files,
        "found": added.num_found,
        "copied": added.num_copied,
        "already_there": added.num_already_there,
        "left_out": [{"file": entry.file, "reason": entry.reason} for entry in added.left_out],
        "new_test_images": added.num_new_test,
        "classes": added.class_counts,
        "refused": added.refused,
        "notes": notes,
    }
    lines = [
        f"Data version {added.version.dvc_hash}: {counted(added.version.num_files, 'file')} in "
        f"{counted(len(added.class_counts), 'class')}",
        f"({added.num_found} found: {added.num_copied} copied, {added.num_already_there} already there, "
        f"{len(added.left_out)} left out; {counted(added.num_new_test, 'new test image')}).",
        *(f"Note: {note}." for note in notes),
        f"Next: git commit -m 'New data version', {following}",
    ]
    finish(answer, as_json, lambda: "\n".join(lines))


def _add_from_predictions(workspace: Path, model: str, as_json: bool) -> None:
    """Captured and labelled images of production become the next data version; an alarm that waited for data is told."""
    from flows.terminal import Console
    from flows.workspace import data
    from flows.workspace.settings import prepare_environment
    from flows.workspace.workspace import Workspace

    found = Workspace.find(workspace)
    prepare_environment(found.state)
    from flows.loop.alarms import tell_of_data
    from flows.loop.labels import gathered, move_relabelled
    from flows.loop.windows import open_loop

    loop = open_loop(found.root, model)
    with found.locked("visionloop data add"), Console(1, quiet=as_json) as console:
        with gathered(loop) as labelled, console.stage("looking at images", 1) as (progress, _):
            relabelled = move_relabelled(loop)
            added = data.add(found, labelled.folder, test_share=None, accepted=loop.settings.accepted, progress=progress)
    notes = []
    if relabelled:
        notes.append(f"{counted(relabelled, 'image')} moved to the class that they are said to show now")
    if labelled.not_kept:
        notes.append(f"{counted(labelled.not_kept, 'labelled image')} not captured, so not added")
    if labelled.damaged:
        notes.append(f"{labelled.damaged} captured images are damaged and were left out")
    woken = tell_of_data(loop, told=lambda line: print(line, file=sys.stderr, flush=True))
    notes += [f"alarm {key} waited for data and was raised again" for key in woken]
    _finish_added(added, notes, "then the loop trains by itself, or visionloop train --recipe NAME", as_json)


@data_app.command("status")
def data_status(workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """Compare data/ with the pinned version. Exit status 1 when they differ."""
    from components import dataversions
    from flows.workspace.workspace import Workspace

    root = Workspace.find(workspace).root
    version = dataversions.pinned(root)
    present = (root / dataversions.DATA).is_dir()
    changes = dataversions.changes(root) if present else {"deleted": [f"{dataversions.DATA}/ (all of it)"]}
    lines = [f"Pinned: {version.dvc_hash}, {counted(version.num_files, 'file')}, {counted(version.bytes, 'byte')}"]
    lines += [f"{kind}: {len(files)} ({', '.join(files[:5])})" for kind, files in changes.items()]
    lines += [] if changes else ["data/ is exactly that version."]
    finish(
        {"data_version": version.dvc_hash, "files": version.num_files, "changes": changes},
        json_,
        lambda: "\n".join(lines),
    )
    if changes:
        raise typer.Exit(1)


@data_app.command("remote")
def data_remote(
    url: Annotated[str, typer.Argument(help="A folder, or s3://bucket/prefix.")],
    endpoint_url: Annotated[str | None, typer.Option(help="Address of an S3 server that is not AWS.")] = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Choose where push and pull go. S3 credentials come from the AWS environment, they are not stored."""
    from components import dataversions
    from flows.workspace.workspace import Workspace

    dataversions.set_remote(Workspace.find(workspace).root, url, endpoint_url=endpoint_url)
    finish({"remote": url}, json_, lambda: f"Remote: {url}")


@data_app.command("push")
def data_push(workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """Send the pinned data version to the remote."""
    from components import dataversions
    from flows.workspace.workspace import Workspace

    sent = dataversions.push(Workspace.find(workspace).root)
    finish({"sent": sent}, json_, lambda: f"{counted(sent, 'object')} sent")


@data_app.command("pull")
def data_pull(
    force: Annotated[bool, typer.Option(help="Overwrite local changes of data/.")] = False,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Bring the pinned data version from the remote into data/."""
    from components import dataversions
    from flows.workspace.workspace import Workspace

    found = Workspace.find(workspace)
    with found.locked("visionloop data pull"):
        changed = dataversions.pull(found.root, force=force)
        version = dataversions.verify(found.root)
    finish(
        {"changed": changed, "data_version": version.dvc_hash},
        json_,
        lambda: f"data/ is version {version.dvc_hash}, {counted(version.num_files, 'file')}",
    )
