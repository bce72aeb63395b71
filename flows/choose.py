"""The map of a choice: networks, passes and engines of a recipe, compared, and the one within the limits as a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows.choosing.finding_out import answer, judged, opened, take
from flows.choosing.outcome import keep, summarise
from flows.choosing.page import write_page
from flows.choosing.winner import winner_name, write_winner
from flows.training import steps
from flows.training.chosen import named

# As in a training: each exporter is a process of its own.
_RUNNER: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=2)


@flow(name="choose", task_runner=_RUNNER, validate_parameters=False)  # type: ignore[arg-type]
def choose(
    recipe: str,
    workspace: str = ".",
    overrides: Sequence[str] = (),
    write: str = "",
    measure_again: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Compare the variants that the recipe's section `choice` names; returns what came of it.

    Each goes through the stages of a training as far as its engines, by the same keys: what was computed before is found,
    and a training of the chosen one finds all of it. No engine is asked about the test images: they judge what was chosen.
    """
    chosen = named(recipe, Path(workspace), overrides)
    with opened(chosen, write, quiet=quiet) as comparison:
        for trunk, run in comparison.trunks:
            with comparison.trying(trunk):
                steps.given_models(run)
        for trunk, run in comparison.trunks:
            comparison.begin(trunk)
            with comparison.trying(trunk):
                dataset = steps.validation(run)
                splits = steps.splitting(run, dataset)
                trained = steps.training(run, splits)
                checkpoint = steps.optimisation(run, trained, splits)
                graph = steps.graph(run, checkpoint)
                engines = steps.engines(run, checkpoint, graph, splits)
                answer(comparison, trunk, splits, engines)
        choice = judged(comparison, take(comparison, anew=measure_again))
        keep(choice, comparison.folder)
        winner = write_winner(comparison.expansion, choice, winner_name(chosen.config, write))
        return summarise(choice, winner, write_page(choice, winner, comparison.folder))
