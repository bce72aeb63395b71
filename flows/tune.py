"""The map of a search: many trainings of a recipe with other values, and the best one as a recipe of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import flow

from flows.training import steps
from flows.training.chosen import named
from flows.tuning.outcome import summarise
from flows.tuning.page import write_page
from flows.tuning.searching import Asked, opened, tried
from flows.tuning.winner import winner_name, write_winner


@flow(name="tune", validate_parameters=False)
def tune(
    recipe: str,
    study: str,
    workspace: str = ".",
    overrides: Sequence[str] = (),
    workers: int = 1,
    write: str = "",
    ray: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Search what the recipe's section `search` says, in a study that goes on where it stopped; returns what came of it.

    The trials share one validation, one division of the images and every cache. Nothing of them is exported or judged: the
    winner is a recipe, which is trained, judged and registered like any other. No trial reads a test image.
    """
    chosen = named(recipe, Path(workspace), overrides)
    with opened(chosen, Asked(study, workers, write, ray), quiet=quiet) as search:
        dataset = steps.validation(search.run)
        splits = steps.splitting(search.run, dataset)
        best = tried(search, splits)
        page = write_page(search.study, search.run.folder)
        winner = write_winner(search.space, search.study, best, winner_name(chosen.config, write))
        return summarise(search, best, winner, page, splits.record.counts["valid"])
