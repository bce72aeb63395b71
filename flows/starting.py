"""What a person starts, in this process: a training, a promotion, a look at windows. Prefect is imported here, not before.

Who calls has prepared the environment (`flows.workspace.settings.prepare_environment`).
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

from components import collector
from components.training import on_this_machine
from flows.terminal import Say, silent
from flows.training.chosen import ChosenRecipe, handed_on
from flows.workspace.settings import Settings, login_name, read_settings
from flows.workspace.workspace import Workspace

if TYPE_CHECKING:
    from flows.loop.loop import Loop
    from flows.workspace.desk import Desk


def start_training(
    recipe: ChosenRecipe, *, by: str | None, measure_again: bool = False, say: Say = silent
) -> dict[str, Any]:
    """Train by a recipe that is parsed already; returns the summary of the run.

    `by` asked for it, the login name by default. `say` is told why the run's own console shows nothing yet. Raises
    VisionloopError.
    """
    from registry.approval import person

    settings = read_settings(recipe.workspace.state)
    _expect_ready(recipe.workspace, settings)
    on_this_machine(recipe.config.training, settings.num_threads, settings.ray_address)
    requester = person(by or login_name()).name
    say(f"getting ready to train by recipe {recipe.name}, which takes up to half a minute the first time ...")
    with collector.kept():
        from flows.train import train

    call: Any = train  # its states confuse the types of Prefect's decorator
    with handed_on(recipe):
        summary: dict[str, Any] = call(
            recipe.name,
            str(recipe.workspace.root),
            recipe.overrides,
            requested_by=requester,
            quiet=False,
            measure_again=measure_again,
        )
    return summary


def start_search(
    recipe: ChosenRecipe, study: str, *, workers: int, write: str, ray: bool = False, say: Say = silent
) -> dict[str, Any]:
    """Search by a recipe that is parsed and checked already; returns what came of it. Raises VisionloopError."""
    from flows.tuning.workers import expect_trainers

    settings = read_settings(recipe.workspace.state)
    _expect_ready(recipe.workspace, settings)
    expect_trainers(recipe.config.training, settings, workers, ray=ray)
    say(f"getting ready to search recipe {recipe.name}, which takes up to half a minute the first time ...")
    with collector.kept():
        from flows.tune import tune

    call: Any = tune
    root = str(recipe.workspace.root)
    with handed_on(recipe):
        summary: dict[str, Any] = call(recipe.name, study, root, recipe.overrides, workers=workers, write=write, ray=ray)
    return summary


def start_choice(recipe: ChosenRecipe, *, write: str, measure_again: bool = False, say: Say = silent) -> dict[str, Any]:
    """Choose among the variants of a recipe that is checked already; returns what came of it. Raises VisionloopError."""
    _expect_ready(recipe.workspace, read_settings(recipe.workspace.state))
    say(f"getting ready to compare variants of {recipe.name}, which takes up to half a minute the first time ...")
    with collector.kept():
        from flows.choose import choose

    call: Any = choose
    root = str(recipe.workspace.root)
    with handed_on(recipe):
        summary: dict[str, Any] = call(
            recipe.name, root, recipe.overrides, write=write, measure_again=measure_again, quiet=False
        )
    return summary


def start_promotion(desk: Desk, version: str, *, quiet: bool) -> dict[str, Any]:
    """Make an approved version the champion; returns model, version, ledger row and release. Raises VisionloopError."""
    _expect_ready(desk.workspace, desk.settings)
    with collector.kept():
        from flows.promote import promote

    return promote(version, desk.model, str(desk.workspace.root), quiet=quiet)


def start_watch(
    loop: Loop,
    *,
    minutes: float | None = None,
    since: datetime.datetime | None = None,
    until: datetime.datetime | None = None,
    quiet: bool,
) -> dict[str, Any]:
    """Judge windows, as `flows.watch.watch` does; returns their verdicts as JSON data. Raises VisionloopError."""
    _expect_ready(loop.workspace, loop.settings)
    with collector.kept():
        from flows.watch import watch

    call: Any = watch  # its states confuse the types of Prefect's decorator
    span = [moment.isoformat() if moment is not None else None for moment in (since, until)]
    found: dict[str, Any] = call(loop.model, str(loop.workspace.root), minutes, *span, quiet=quiet)
    return found


def _expect_ready(workspace: Workspace, settings: Settings) -> None:
    """Before Prefect is imported, which takes seconds: what can only fail should fail at once."""
    from flows.orchestrator.events import expect_server

    workspace.expect_writable()
    expect_server(settings)
