"""`visionloop`: the loop on the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components import garbage
from components.contracts import ConfigError, counted
from flows.answering import HERE, AsJson, Commands, InWorkspace, finish
from flows.cli_backup import add_backup_commands
from flows.cli_loop import add_loop_commands
from flows.cli_registry import add_registry_commands
from flows.cli_serving import add_serving_commands

if TYPE_CHECKING:
    from flows.data import Added

app = Commands(
    name="visionloop",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="""Turn labelled images into engines that are judged and approved before they are served.

    The loop, in order:

    \b
      visionloop init DIR                a workspace: git, DVC, your recipes
      visionloop data add FOLDER         one sub-folder per class -> a pinned data version
      visionloop recipe list | show      what can be trained, and how
      visionloop train --recipe NAME     validate, split, train, export, evaluate, judge, package, register
      visionloop candidates | show V     what waits for a person, with the evidence beside the champion
      visionloop approve V --as WHO      a second person decides; also reject
      visionloop promote V               everything is checked again, then it goes live; rollback goes back
      visionloop serve --model NAME      answers over HTTP and gRPC; picks up a new champion by itself
      visionloop predict SOURCE          a folder, .parquet or s3:// through the champion, resumable
      visionloop predictions export      what was answered; also verify and erase
      visionloop up | status | down      what the loop needs: Prefect server, schedules, automations, a worker; deploy
      visionloop watch | windows         does what the champion sees still look like its reference?
      visionloop alarms | sweep          drift that was seen, and what came of it
      visionloop labels import FILE      what people say that images of production show; data add --from-predictions
      visionloop governor history        what may train without a person, and why or why not; stop, start, reset
      visionloop history | who-served    what was decided, and what served at any moment
      visionloop runs                    what was run, and what came of it
      visionloop store verify            every artefact against its digests
      visionloop backup FILE | restore   one file that a workspace can be made anew from, while it is in use
      visionloop report                  the page of all this
      visionloop demo                    all of it on real digits, in a scratch workspace

    Every command that answers takes --json and then prints one JSON object as its last line.
    Exit status: 0 done, 1 the answer is no (rejected, drifted, not as it should be), 2 an error that says what to do.""",
)
data_app = Commands(help="Images and their pinned versions.")
recipe_app = Commands(help="What can be trained, and how.")
store_app = Commands(help="Published artefacts.")
app.add_typer(data_app, name="data")
app.add_typer(recipe_app, name="recipe")
app.add_typer(store_app, name="store")
add_registry_commands(app)
add_serving_commands(app)
add_loop_commands(app)
add_backup_commands(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        from flows.run import version

        print(f"visionloop {version()}")
        raise typer.Exit


@app.callback()
def every(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before any command."""


@app.command()
def init(directory: Annotated[Path, typer.Argument(help="Where; made if missing.")] = HERE, json_: AsJson = False) -> None:
    """Make a workspace: git and DVC, ready for `data add`."""
    from components import dataversions
    from flows.run import Workspace

    workspace = Workspace.create(directory)
    repository = dataversions.repository(workspace.root)
    within = "" if repository == workspace.root else f" It is part of the git repository {repository}."
    finish(
        {"workspace": str(workspace.root), "repository": str(repository)},
        json_,
        lambda: f"Workspace {workspace.root} is ready.{within} Next: visionloop data add FOLDER (one sub-folder per class)",
    )


@app.command()
def train(
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Name of a recipe, or the path of a .yaml file.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="Override, such as training.fit.epochs=5. May be repeated.")
    ] = None,
    as_: Annotated[
        str | None, typer.Option("--as", help="Who asks for it, and then cannot approve it; your login name by default.")
    ] = None,
    measure_again: Annotated[
        bool, typer.Option("--measure-again", help="Time the engines anew: the machine was busy when they were measured.")
    ] = False,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Validate, split, train, export, evaluate, judge, package and register, in one run that can be resumed."""
    from flows.config import load_recipe
    from flows.events import expect_server
    from flows.run import Workspace
    from flows.settings import prepare_environment, read_settings

    found = Workspace.find(workspace)
    # Before Prefect is even imported: a typo should cost no time.
    load_recipe(recipe, set_ or [], workspace=found.root)
    prepare_environment(found.state)
    found.expect_writable()
    expect_server(read_settings(found.state))
    _train(found.root, recipe, set_ or [], as_, json_, measure_again=measure_again)


def _trained(
    root: Path, recipe: str, overrides: list[str], by: str | None, *, measure_again: bool = False
) -> dict[str, Any]:
    from flows.settings import login_name
    from registry.approval import person

    requester = person(by or login_name()).name
    with garbage.kept():
        from flows.train import train as flow

    call: Any = flow  # its states confuse the types of Prefect's decorator
    summary: dict[str, Any] = call(
        recipe, str(root), overrides, requested_by=requester, quiet=False, measure_again=measure_again
    )
    return summary


def _train(root: Path, recipe: str, overrides: list[str], by: str | None, as_json: bool, *, measure_again: bool) -> None:
    summary = _trained(root, recipe, overrides, by, measure_again=measure_again)
    finish(summary, as_json, lambda: _told(summary))
    if summary["outcome"] != "candidate":
        raise typer.Exit(1)


def _told(summary: dict[str, Any]) -> str:
    from flows.summary import told

    return told(summary)


@app.command()
def demo(
    directory: Annotated[
        Path, typer.Option("--directory", help="Scratch workspace; kept, so a second demo goes on where this one stopped.")
    ] = Path(".demo"),
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port of the Prefect server.")] = None,
    stop: Annotated[bool, typer.Option("--stop", help="Leave nothing running at the end: no pages to look at.")] = False,
    json_: AsJson = False,
) -> None:
    """The whole loop on the embedded digits, in a scratch workspace: no account, no server of yours, no download."""
    from flows.demo import prepare
    from flows.settings import prepare_environment, read_settings

    def told(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    workspace = prepare(directory)
    prepare_environment(workspace.state)
    from flows.showing import Show
    from flows.standing import Up

    show = Show(workspace, lambda: _trained(workspace.root, "digits", [], None), told, port=port)
    up = Up(workspace, read_settings(workspace.state))
    try:
        phases = show.run()
        if not stop:
            up.start_pages(told=lambda line: told(f"  {line}"))
        answer = show.finish({} if stop else up.addresses())
    finally:
        if stop:
            up.stop(told=told)
    finish(answer | {"phases": phases}, json_, lambda: show.text(answer))
    if phases["train"]["outcome"] != "candidate":
        raise typer.Exit(1)


@app.command()
def runs(workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """What was run in this workspace: when it was first started, what came of it, and what was set."""
    from flows.past_runs import past_runs, told
    from flows.run import Workspace

    found = past_runs(Workspace.find(workspace))
    lines = [told(run) for run in found]
    finish({"runs": found}, json_, lambda: "\n".join(lines) or "No runs yet. Next: visionloop train --recipe NAME")


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
    from flows import data
    from flows.console import Console
    from flows.run import Workspace
    from flows.settings import read_settings

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
    from flows import data

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
    from flows import data
    from flows.console import Console
    from flows.run import Workspace
    from flows.settings import prepare_environment

    found = Workspace.find(workspace)
    prepare_environment(found.state)
    from flows.alarming import tell_of_data
    from flows.labelling import gathered, move_relabelled
    from flows.watching import open_loop

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
    from flows.run import Workspace

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
    from flows.run import Workspace

    dataversions.set_remote(Workspace.find(workspace).root, url, endpoint_url=endpoint_url)
    finish({"remote": url}, json_, lambda: f"Remote: {url}")


@data_app.command("push")
def data_push(workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """Send the pinned data version to the remote."""
    from components import dataversions
    from flows.run import Workspace

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
    from flows.run import Workspace

    found = Workspace.find(workspace)
    with found.locked("visionloop data pull"):
        changed = dataversions.pull(found.root, force=force)
        version = dataversions.verify(found.root)
    finish(
        {"changed": changed, "data_version": version.dvc_hash},
        json_,
        lambda: f"data/ is version {version.dvc_hash}, {counted(version.num_files, 'file')}",
    )


def _root_of(folder: Path) -> Path | None:
    """The workspace's root, so that its recipes and plug-ins are known; None outside of one."""
    from flows.run import Workspace

    try:
        return Workspace.find(folder).root
    except ConfigError:
        return None


@recipe_app.command("list")
def recipe_list(workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """The shipped recipes and the workspace's own."""
    from flows.config import load_recipe, recipe_files

    root = _root_of(workspace)
    found: dict[str, str] = {}
    problems: dict[str, str] = {}
    for name in sorted(recipe_files(root)):
        try:
            found[name] = load_recipe(name, workspace=root).description
        except ConfigError as error:
            problems[name] = str(error)
    lines = [f"{name:16} {text}" for name, text in found.items()]
    lines += [f"{name:16} cannot be used: {problem}" for name, problem in problems.items()]
    finish({"recipes": found, "problems": problems}, json_, lambda: "\n".join(lines))


@recipe_app.command("show")
def recipe_show(
    recipe: str,
    set_: Annotated[list[str] | None, typer.Option("--set", "-s", help="Override to apply first.")] = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """A recipe with every default written out."""
    import yaml

    from flows.config import load_recipe, resolved

    values = resolved(load_recipe(recipe, set_ or [], workspace=_root_of(workspace)))
    finish(values, json_, lambda: yaml.safe_dump(values, sort_keys=False).rstrip())


@recipe_app.command("schema")
def recipe_schema(json_: AsJson = False) -> None:
    """JSON Schema of a recipe, for editors."""
    from flows.config import RunConfig

    schema = RunConfig.model_json_schema()
    finish(schema, json_, lambda: json.dumps(schema, indent=1))


@store_app.command("verify")
def store_verify(
    discard: Annotated[
        bool, typer.Option(help="Set what does not verify aside, so that the next run makes it anew.")
    ] = False,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Check every published artefact against its manifest. Exit status 1 when one does not verify."""
    from components.contracts import TamperedArtefact
    from components.store import read_manifest
    from flows.run import Workspace

    found = Workspace.find(workspace)
    store, broken, intact = found.store, [], 0
    for folder in store.artefacts():
        try:
            read_manifest(folder)
            intact += 1
        except TamperedArtefact as error:
            moved = str(store.discard(folder)) if discard else None
            broken.append({"folder": str(folder), "problem": str(error), "moved_to": moved})
    lines = [f"{counted(intact, 'artefact')} intact, {len(broken)} not"]
    lines += [f"{b['problem']}" + (f" Moved to {b['moved_to']}" if b["moved_to"] else "") for b in broken]
    finish({"intact": intact, "broken": broken}, json_, lambda: "\n".join(lines))
    if broken and not discard:
        raise typer.Exit(1)


def run() -> None:
    """Run the command that the command line names."""
    garbage.skip_at_exit()
    app()
