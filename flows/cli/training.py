"""Commands about workspaces, recipes, training runs and their store."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from components.contracts.errors import ConfigError
from components.contracts.wording import counted
from flows.cli.answers import HERE, AsJson, Commands, InWorkspace, finish
from flows.terminal import silent, to_stderr

recipe_app = Commands(help="What can be trained, and how.")
augment_app = Commands(help="What training makes of images.")
store_app = Commands(help="Published artefacts.")


def add_training_commands(app: Commands) -> None:
    """Put them onto the command line."""
    for command in (init, train, runs):
        app.command()(command)
    app.add_typer(recipe_app, name="recipe")
    app.add_typer(augment_app, name="augment")
    app.add_typer(store_app, name="store")


def init(
    directory: Annotated[Path, typer.Argument(help="Where; made if missing.")] = HERE,
    serving: Annotated[
        bool, typer.Option("--serving", help="Only a folder for servers, with neither git nor data.")
    ] = False,
    json_: AsJson = False,
) -> None:
    """Make a workspace: git and DVC, ready for `data add`."""
    from components import git
    from flows.workspace.workspace import Workspace

    if serving:
        root = Workspace.create_to_serve(directory).root
        finish(
            {"workspace": str(root), "repository": None},
            json_,
            lambda: (
                f"{root} is ready to serve. Next: set VISIONLOOP_RELEASES to where releases are published, and run "
                f"visionloop serve --model NAME"
            ),
        )
        return
    workspace = Workspace.create(directory)
    repository = git.top_folder(workspace.root)
    within = "" if repository == workspace.root else f" It is part of the git repository {repository}."
    finish(
        {"workspace": str(workspace.root), "repository": str(repository)},
        json_,
        lambda: f"Workspace {workspace.root} is ready.{within} Next: visionloop data add FOLDER (one sub-folder per class)",
    )


def train(
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Name of a recipe, or the path of a .yaml file.")],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            help="Override, such as training.fit.epochs=5 or gating.gates.accuracy.floor=0.9. May be repeated.",
        ),
    ] = None,
    as_: Annotated[
        str | None, typer.Option("--as", help="Who asks for it, and then cannot approve it; your login name by default.")
    ] = None,
    measure_again: Annotated[
        bool, typer.Option("--measure-again", help="Time the engines anew: the machine was busy when they were measured.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what would be run, computed and trained, and about how long.")
    ] = False,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Validate, split, train, export, evaluate, judge, package and register, in one run that can be resumed."""
    from flows.starting import start_training
    from flows.training.chosen import choose
    from flows.training.summary import told
    from flows.workspace.settings import prepare_environment
    from flows.workspace.workspace import Workspace

    if dry_run:
        _dry_run(recipe, set_ or [], workspace, json_, measure_again=measure_again)
        return
    found = Workspace.find(workspace)
    # Before Prefect is even imported: a typo should cost no time.
    chosen = choose(recipe, found, set_ or [])
    prepare_environment(found.state)
    summary = start_training(chosen, by=as_, measure_again=measure_again, say=silent if json_ else to_stderr)
    finish(summary, json_, lambda: told(summary))
    if summary["outcome"] != "candidate":
        raise typer.Exit(1)


def _dry_run(recipe: str, overrides: list[str], workspace: Path, json_: bool, *, measure_again: bool) -> None:
    from flows.training.chosen import choose
    from flows.training.dry_run import dry_run, told
    from flows.workspace.workspace import Workspace

    sys.dont_write_bytecode = True  # a workspace's own plug-ins are loaded, and leave nothing beside them
    chosen = choose(recipe, Workspace.find(workspace), overrides)
    plan = dry_run(chosen, measure_again=measure_again, say=silent if json_ else to_stderr)
    finish(plan.to_json(), json_, lambda: "\n".join(told(plan)))


def runs(workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """What was run in this workspace: when it was first started, what came of it, and what was set."""
    from flows.training.past_runs import past_runs, told
    from flows.workspace.workspace import Workspace

    found = past_runs(Workspace.find(workspace))
    lines = [told(run) for run in found]
    finish({"runs": found}, json_, lambda: "\n".join(lines) or "No runs yet. Next: visionloop train --recipe NAME")


def _root_of(folder: Path) -> Path | None:
    """The workspace's root, so that its recipes and plug-ins are known; None outside of one."""
    from flows.workspace.workspace import Workspace

    try:
        return Workspace.find(folder).root
    except ConfigError:
        return None


@augment_app.callback()
def augment() -> None:
    """What training makes of images."""


@augment_app.command("preview")
def augment_preview(
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Name of a recipe, or the path of a .yaml file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .png file to write; an earlier one is replaced.")],
    set_: Annotated[list[str] | None, typer.Option("--set", "-s", help="Override to apply first.")] = None,
    images: Annotated[int, typer.Option(min=1, max=100, help="How many images.")] = 6,
    draws: Annotated[int, typer.Option(min=1, max=30, help="How many draws of each, at most.")] = 7,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Write a contact sheet: images that are no test images, and what a recipe's augmentations make of each."""
    from flows.training.chosen import choose
    from flows.training.preview import preview
    from flows.workspace.workspace import Workspace

    written = preview(choose(recipe, Workspace.find(workspace), set_ or []), out, num_images=images, num_draws=draws)
    finish(
        {"file": str(written.file), "images": list(written.pictures), "phases": list(written.phases)},
        json_,
        lambda: "\n".join([f"{written.file}: {counted(len(written.pictures), 'image')}", *written.phases]),
    )


@recipe_app.command("list")
def recipe_list(workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """The shipped recipes and the workspace's own."""
    from flows.workspace.recipes import known_recipes

    found = known_recipes(_root_of(workspace))
    lines = [f"{name:16} {text}" for name, text in found.descriptions.items()]
    lines += [f"{name:16} cannot be used: {problem}" for name, problem in found.problems.items()]
    finish({"recipes": found.descriptions, "problems": found.problems}, json_, lambda: "\n".join(lines))


@recipe_app.command("show")
def recipe_show(
    recipe: str,
    set_: Annotated[list[str] | None, typer.Option("--set", "-s", help="Override to apply first.")] = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """A recipe with every default written out."""
    import yaml

    from flows.workspace.recipes import load_recipe, resolved

    values = resolved(load_recipe(recipe, set_ or [], workspace=_root_of(workspace)))
    finish(values, json_, lambda: yaml.safe_dump(values, sort_keys=False).rstrip())


@recipe_app.command("new")
def recipe_new(
    name: Annotated[str, typer.Argument(help="Name of the recipe and of the model that it trains.")],
    from_: Annotated[str, typer.Option("--from", help="The recipe to copy: a shipped one or one of the workspace.")],
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Write recipes/NAME.yaml: a copy of a recipe, with its comments, to be edited."""
    from flows.workspace.new_recipe import new_recipe
    from flows.workspace.workspace import Workspace

    made = new_recipe(Workspace.find(workspace).root, name, from_)
    finish(
        made.to_json(),
        json_,
        lambda: (
            f"{made.file} is a copy of {made.copied_from!r} for the model {made.model!r}. "
            f"Next: edit it; visionloop recipe show {name}"
        ),
    )


@recipe_app.command("schema")
def recipe_schema(json_: AsJson = False) -> None:
    """JSON Schema of a recipe, for editors, with the bounds of all that a search can vary."""
    from flows.workspace.searchable import schema

    found = schema()
    finish(found, json_, lambda: json.dumps(found, indent=1))


@store_app.command("verify")
def store_verify(
    discard: Annotated[
        bool, typer.Option(help="Set what does not verify aside, so that the next run makes it anew.")
    ] = False,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Check every published artefact against its manifest. Exit status 1 when one does not verify."""
    from flows.workspace.artefacts import verify_store
    from flows.workspace.workspace import Workspace

    found = verify_store(Workspace.find(workspace), discard=discard)
    lines = [f"{counted(found.intact, 'artefact')} intact, {len(found.broken)} not"]
    lines += [b.problem + (f" Moved to {b.moved_to}" if b.moved_to else "") for b in found.broken]
    broken = [
        {"folder": str(b.folder), "problem": b.problem, "moved_to": str(b.moved_to) if b.moved_to else None}
        for b in found.broken
    ]
    finish({"intact": found.intact, "broken": broken}, json_, lambda: "\n".join(lines))
    if broken and not discard:
        raise typer.Exit(1)


@store_app.command("gc")
def store_gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would be removed.")] = False,
    keep_runs: Annotated[int, typer.Option("--keep-runs", help="How many of the last runs stay.")] = 5,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Remove artefacts, caches and run folders that neither the ledger, the pinned data nor the last runs reach."""
    from flows.training.garbage import collect
    from flows.workspace.workspace import Workspace

    found = collect(Workspace.find(workspace), keep_runs=keep_runs, dry_run=dry_run)
    answer = {
        "removed": [{"kind": each.kind, "folder": str(each.folder), "bytes": each.bytes} for each in found.unreached],
        "kept_runs": list(found.kept_runs),
        "before_bytes": found.before_bytes,
        "after_bytes": found.after_bytes,
        "dry_run": dry_run,
    }
    lines = [f"{each.kind:10}  {each.bytes / 1e6:10.1f} MB  {each.folder}" for each in found.unreached]
    lines.append(
        f"{'Would remove' if dry_run else 'Removed'} {counted(len(found.unreached), 'folder')}, "
        f"{found.freed_bytes / 1e6:.1f} MB: {found.before_bytes / 1e6:.1f} MB before, "
        f"{found.after_bytes / 1e6:.1f} MB after; {counted(len(found.kept_runs), 'run')} kept."
    )
    finish(answer, json_, lambda: "\n".join(lines))
