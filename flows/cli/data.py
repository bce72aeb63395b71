"""Commands about data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from components.contracts.errors import ConfigError
from components.contracts.wording import counted
from flows.cli.answers import HERE, AsJson, Commands, InWorkspace, finish
from flows.cli.review import review_app
from flows.terminal import to_stderr

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flows.workspace.adding import NotedVersion
    from flows.workspace.checking import Checked


data_app = Commands(help="Images and their pinned versions.")
data_app.add_typer(review_app, name="review")


@data_app.command("add")
def data_add(
    given: Annotated[
        str | None,
        typer.Argument(
            metavar="[SOURCE]",
            help="A folder with one sub-folder per class, a file that a source takes, or the name of a source such as "
            "digits; none to pin data/ as it is.",
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="The source plug-in that SOURCE is for, where its look does not say it.")
    ] = None,
    from_predictions: Annotated[
        str | None, typer.Option(help="The model whose captured and labelled images of production are added.")
    ] = None,
    test_share: Annotated[
        float | None, typer.Option(min=0.05, max=0.5, help="Share that is test for ever; frozen by the first add.")
    ] = None,
    source_setting: Annotated[
        list[str] | None, typer.Option(help="A setting of the source, such as dataset=CIFAR10; may be repeated.")
    ] = None,
    keep_splits: Annotated[
        bool | None,
        typer.Option(
            "--keep-splits/--merge-splits",
            help="Of train/, test/ and perhaps val/ that hold class folders: keep test/ as test for ever, or choose the "
            "test images among all of it. Images of val/ are added to those that training and validation are drawn from.",
        ),
    ] = None,
    near_duplicates: Annotated[
        Literal["refuse", "exclude", "ignore"] | None,
        typer.Option(
            show_default="refuse",
            help="New images that show what a frozen test image shows, or the same under another label: add nothing "
            "(exit status 1), add them and keep them out of what they would poison, or take them for images of their own.",
        ),
    ] = None,
    max_cluster_share: Annotated[
        float | None,
        typer.Option(
            show_default="0.05",
            min=0,
            max=1,
            help="A cluster of near-duplicates with a larger share of the images is refused.",
        ),
    ] = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Copy images into data/, freeze which of them are test, and pin the result as a new data version."""
    from flows.terminal import Console
    from flows.workspace.adding import add_images
    from flows.workspace.near_duplicates import MAX_CLUSTER_SHARE, PoisonsTest
    from flows.workspace.workspace import Workspace
    from flows.workspace.yaml_reading import parse_settings

    if from_predictions is not None and (given is not None or source is not None):
        raise ConfigError("give a SOURCE or --from-predictions, one of them")
    if from_predictions is not None and (test_share, near_duplicates, max_cluster_share) != (None, None, None):
        raise ConfigError(
            "--test-share, --near-duplicates and --max-cluster-share are not of --from-predictions; leave them out: the "
            "test share is that of the data, and what would poison the frozen test set is kept out of it"
        )
    if keep_splits is not None and given is None and source is None:
        raise ConfigError("--keep-splits and --merge-splits are of a folder or a source that is split; name it, too")
    if source_setting and given is None and source is None:
        raise ConfigError("--source-setting is of a source; name it, too")
    settings = parse_settings(source_setting or [], "--source-setting")
    if from_predictions is not None:
        _add_from_predictions(workspace, from_predictions, json_)
        return
    found = Workspace.find(workspace)
    try:
        with Console(1, quiet=json_) as console:
            noted = add_images(
                found,
                given,
                source=source,
                source_settings=settings,
                test_share=test_share,
                keep_splits=keep_splits,
                near_duplicates=near_duplicates or "refuse",
                max_cluster_share=MAX_CLUSTER_SHARE if max_cluster_share is None else max_cluster_share,
                console=console,
            )
    except PoisonsTest as refusal:
        told, conflicts = str(refusal), [dataclasses.asdict(conflict) for conflict in refusal.conflicts]
        finish({"refused": told, "conflicts": conflicts}, json_, lambda: f"Not added: {told}")
        raise typer.Exit(1) from None
    _finish_added(noted, "visionloop train --recipe NAME", json_)


def _finish_added(noted: NotedVersion, following: str, as_json: bool) -> None:
    added = noted.added
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
        "leaked": list(added.sides.leaked),
        "stay_test": list(added.sides.stay_test),
        "stay_rest": list(added.sides.stay_rest),
        "with_attributes": added.num_with_attributes,
        "new_classes": list(added.new_classes),
        "changed_attributes": list(added.changed_attributes),
        "notes": list(noted.notes),
        "amounts": [dataclasses.asdict(amount) for amount in noted.amounts],
    }
    lines = [
        f"Data version {added.version.dvc_hash}: {counted(added.version.num_files, 'file')} in "
        f"{counted(len(added.class_counts), 'class')}",
        f"({added.num_found} found: {added.num_copied} copied, {added.num_already_there} already there, "
        f"{len(added.left_out)} left out; {counted(added.num_new_test, 'new test image')}).",
        *(f"Note: {note}." for note in noted.notes),
        *(f"Note: {told}." for amount in noted.amounts if (told := amount.told())),
        f"Next: git commit -m 'New data version', then {following}"
        if noted.is_new
        else f"Nothing is new: this version was pinned before. Next: {following}",
    ]
    finish(answer, as_json, lambda: "\n".join(lines))


def _add_from_predictions(workspace: Path, model: str, as_json: bool) -> None:
    """Captured and labelled images of production become the next data version; an alarm that waited for data is told."""
    from flows.terminal import Console
    from flows.workspace.settings import prepare_environment
    from flows.workspace.workspace import Workspace

    found = Workspace.find(workspace)
    prepare_environment(found.state)
    from flows.loop.adding import add_labelled
    from flows.loop.windows import open_loop

    loop = open_loop(found.root, model)
    with Console(1, quiet=as_json) as console:
        noted = add_labelled(loop, console=console, say=to_stderr)
    _finish_added(noted, "the loop trains by itself, or visionloop train --recipe NAME", as_json)


@data_app.command("check")
def data_check(
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Whose findings and severities are taken; all by default.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key of the recipe: section.key=value.")] = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Look for what is wrong with the images in data/. Exit status 1 when something is critical or a warning."""
    from flows.terminal import Console
    from flows.workspace.checking import check_data
    from flows.workspace.workspace import Workspace

    if set_ and recipe is None:
        raise ConfigError("--set is of a recipe; name it by --recipe, too")
    found = Workspace.find(workspace)
    with Console(1, quiet=json_) as console, console.stage("looking at images", 1) as (progress, _):
        checked = check_data(found, recipe, set_ or (), kept=True, progress=progress)
    answer = {
        "files": checked.num_files,
        "issues": [issue.to_json() for issue in checked.issues],
        "looked_for": {each.name: each.num_issues for each in checked.looked if each.ran},
        "not_looked_for": {each.name: each.reason for each in checked.looked if not each.ran},
        "notes": list(checked.notes),
        "table": str(checked.table),
        "sheet": str(checked.sheet),
    }
    finish(answer, json_, lambda: "\n".join(_checked_lines(checked)))
    if not checked.clean:
        raise typer.Exit(1)


def _checked_lines(checked: Checked) -> Iterator[str]:
    for severity, kind, of in checked.by_kind():
        yield f"{severity:<8}  {kind:<20}  {counted(len(of), 'issue')}: {of[0].action}"
        yield from (f"            {issue.told}" for issue in of[:3])
        if len(of) > 3:
            yield f"            ... and {len(of) - 3} more"
    ran = ", ".join(each.name for each in checked.looked if each.ran)
    yield f"{counted(checked.num_files, 'file')} looked at, {counted(len(checked.issues), 'issue')}. Looked for: {ran}."
    for each in checked.looked:
        if not each.ran:
            yield f"Not looked for: {each.name} ({each.reason})."
    yield from (f"Note: {note}." for note in checked.notes)
    yield f"All of them: {checked.sheet} for a spreadsheet, {checked.table} for programs"
    if checked.issues:
        yield "Next: visionloop data review asks about each of them, in a page with its pictures and in a CSV file"


@data_app.command("status")
def data_status(workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """Compare data/ with the pinned version. Exit status 1 when they differ."""
    from flows.workspace.data import status
    from flows.workspace.workspace import Workspace

    found = status(Workspace.find(workspace))
    version, changes = found.version, found.changes
    lines = [f"Pinned: {version.dvc_hash}, {counted(version.num_files, 'file')}, {counted(version.bytes, 'byte')}"]
    lines += [f"{kind}: {len(files)} ({', '.join(files[:5])})" for kind, files in changes.items()]
    lines += [f"Note: {told}." for told in found.notes]
    lines += [] if changes else ["data/ is exactly that version."]
    finish(
        {
            "data_version": version.dvc_hash,
            "files": version.num_files,
            "changes": changes,
            "notes": list(found.notes),
        },
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
    from components import dvc_repository
    from flows.workspace.workspace import Workspace

    dvc_repository.set_remote(Workspace.find(workspace).root, url, endpoint_url=endpoint_url)
    finish({"remote": url}, json_, lambda: f"Remote: {url}")


@data_app.command("push")
def data_push(workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """Send the pinned data version to the remote."""
    from components import transfers
    from flows.workspace.workspace import Workspace

    sent = transfers.push(Workspace.find(workspace).root)
    finish({"sent": sent}, json_, lambda: f"{counted(sent, 'object')} sent")


@data_app.command("pull")
def data_pull(
    force: Annotated[bool, typer.Option(help="Overwrite local changes of data/.")] = False,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Bring the pinned data version from the remote into data/."""
    from flows.workspace.data import pull
    from flows.workspace.workspace import Workspace

    pulled = pull(Workspace.find(workspace), force=force)
    finish(
        {"changed": pulled.changed, "data_version": pulled.version.dvc_hash},
        json_,
        lambda: f"data/ is version {pulled.version.dvc_hash}, {counted(pulled.version.num_files, 'file')}",
    )


@data_app.command("suggest")
def data_suggest(
    out: Annotated[Path, typer.Option("--out", help="The new folder that the batch is written to.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The model whose champion is asked.")],
    source: Annotated[
        Path | None, typer.Argument(help="A folder of unlabelled pictures, also in sub-folders; none with --captured.")
    ] = None,
    from_captures: Annotated[
        bool,
        typer.Option(
            "--captured",
            help="Choose among what servers of this workspace were asked of the model and kept (serve --capture-share), and "
            "nobody labelled. The batch holds copies, which `predictions erase` does not reach.",
        ),
    ] = False,
    most: Annotated[int, typer.Option("--most", min=1, help="Most pictures of the batch.")] = 100,
    pseudo_labels: Annotated[
        float | None,
        typer.Option(
            min=0.5,
            max=1.0,
            help="Also write the other pictures that are answered with at least this confidence, with the answer as their "
            "label: they train, and are never in valid, calibration or test.",
        ),
    ] = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Choose which unlabelled pictures are worth a label: unsure, unlike what the model knows, unlike each other.

    Fill in the column label of suggestions.csv, or label in Label Studio, and give the result to visionloop data add.
    """
    from flows.loop.suggesting import MANIFEST, SHEET, suggest_labels
    from flows.terminal import Console
    from flows.workspace.settings import prepare_environment
    from flows.workspace.workspace import Workspace

    if (source is None) is not from_captures:
        raise ConfigError("name a folder of pictures or --captured, one of them")
    found = Workspace.find(workspace)
    prepare_environment(found.state)
    with (
        Console(1, quiet=json_) as console,
        console.stage("asking the champion", 1) as (progress, _),
    ):
        done = suggest_labels(found, model, source, out=out, most=most, pseudo_labels=pseudo_labels, progress=progress)
    lines = [
        f"{counted(len(done.chosen), 'picture')} of {done.num_pool} to label, in {out} ({SHEET} shows them): fill in the "
        f"column label of {MANIFEST}, then visionloop data add {out / MANIFEST}"
    ]
    if len(done.chosen) < min(most, done.num_pool):
        lines.append("The others are answered surely, or like those that are known or in the batch.")
    lines += [f"{one.found_as}: {one.proposal} {one.confidence:.2f}, {one.why}" for one in done.chosen[:5]]
    lines += [f"{counted(done.num_known, 'picture')} of the data passed over."] if done.num_known else []
    lines += [f"{counted(done.errors, 'file')} got no answer."] if done.errors else []
    lines += [f"{counted(done.num_pseudo, 'picture')} with a pseudo-label."] if pseudo_labels is not None else []
    answer = dataclasses.asdict(done) | {"out": str(out)}
    finish(answer, json_, lambda: "\n".join(lines))
