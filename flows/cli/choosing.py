"""The command that chooses among variants of a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli.answers import HERE, AsJson, InWorkspace, finish
from flows.terminal import silent, to_stderr


def choose(
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Name of a recipe with a section choice, or a .yaml file.")],
    set_: Annotated[list[str] | None, typer.Option("--set", "-s", help="Override to apply first. May be repeated.")] = None,
    write: Annotated[str, typer.Option("--write", help="Name of the chosen recipe; RECIPE-chosen by default.")] = "",
    measure_again: Annotated[
        bool, typer.Option("--measure-again", help="Time the engines anew, whatever was measured before.")
    ] = False,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Compare networks, passes and engines on the valid images, and write the one within the limits as a recipe of its own.

    Resumed by the same command. Exit status 1: no variant is within the recipe's limits, and the nearest is told.
    """
    from flows.choosing.expansion import expanded
    from flows.choosing.outcome import told
    from flows.starting import start_choice
    from flows.training.chosen import choose as parsed
    from flows.workspace.settings import prepare_environment
    from flows.workspace.workspace import Workspace

    found = Workspace.find(workspace)
    # Before Prefect is even imported: a typo should cost no time.
    named = parsed(recipe, found, set_ or [])
    expanded(named)
    prepare_environment(found.state)
    say = silent if json_ else to_stderr
    summary = start_choice(named, write=write, measure_again=measure_again, say=say)
    finish(summary, json_, lambda: told(summary))
    if summary["chosen"] is None:
        raise typer.Exit(1)
