"""Commands about searches of recipes."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from flows.cli.answers import HERE, AsJson, Commands, InWorkspace, finish
from flows.terminal import silent, to_stderr

study_app = Commands(help="What was searched.")


def add_tuning_commands(app: Commands) -> None:
    """Put them onto the command line."""
    app.command()(tune)
    app.add_typer(study_app, name="study")


def tune(
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Name of a recipe with a section search, or a .yaml file.")],
    set_: Annotated[list[str] | None, typer.Option("--set", "-s", help="Override to apply first. May be repeated.")] = None,
    study: Annotated[
        str | None,
        typer.Option("--study", help="Name of the study; that of the recipe by default. One that is there goes on."),
    ] = None,
    trials: Annotated[int | None, typer.Option("--trials", help="How many trials in all, those of before included.")] = None,
    sampler: Annotated[Literal["tpe", "random"] | None, typer.Option("--sampler", help="How values are proposed.")] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, max=64, help="Processes that train trials, side by side.")] = 1,
    ray: Annotated[
        bool, typer.Option("--ray", help="The workers are on the Ray cluster at VISIONLOOP_RAY_ADDRESS.")
    ] = False,
    write: Annotated[str, typer.Option("--write", help="Name of the winner's recipe; RECIPE-tuned by default.")] = "",
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Train a recipe with many other values, and write the best ones as a recipe of its own. Resumed by the same command."""
    from flows.starting import start_search
    from flows.training.chosen import choose
    from flows.tuning.outcome import told
    from flows.tuning.space import space_of
    from flows.workspace.recipes import expect_plain_name
    from flows.workspace.settings import prepare_environment
    from flows.workspace.workspace import Workspace

    found = Workspace.find(workspace)
    overrides = [*(set_ or [])]
    for key, value in (("trials", trials), ("sampler", sampler)):
        if value is not None:
            overrides.append(f"search.{key}={value}")
    # Before Prefect is even imported: a typo should cost no time.
    chosen = choose(recipe, found, overrides)
    named = study or chosen.config.name
    expect_plain_name(named)
    space = space_of(chosen)
    prepare_environment(found.state)
    say = silent if json_ else to_stderr
    summary = start_search(chosen, named, workers=workers, write=write, ray=ray, say=say)
    finish(summary, json_, lambda: told(summary, space.parameters))


@study_app.command("list")
def study_list(workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """The studies of the workspace's database."""
    from flows.tuning.past import past_studies, told_study
    from flows.workspace.workspace import Workspace

    found = past_studies(Workspace.find(workspace))
    lines = [told_study(one) for one in found]
    finish({"studies": found}, json_, lambda: "\n".join(lines) or "No studies yet. Next: visionloop tune --recipe NAME")


@study_app.command("show")
def study_show(
    study: Annotated[str, typer.Argument(help="Name of the study.")],
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """A study's trials, and its page as it is now, also while it is searched."""
    from flows.tuning.past import shown_study, told_trials
    from flows.workspace.workspace import Workspace

    found = shown_study(Workspace.find(workspace), study)
    finish(found, json_, lambda: "\n".join(told_trials(found)))
