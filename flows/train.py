"""The map of the product: from pixels to a judged, registered candidate."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.states import Completed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.loop.permits import Cause, governed
from flows.training import steps
from flows.training.bundle import summarise, write_report
from flows.training.chosen import ChosenRecipe, named
from flows.training.folds import divided, estimated
from flows.training.keys import asked_corrupted
from flows.training.opening import opened
from flows.training.results import Results
from flows.training.serving_choice import served

# Two engines are built at a time: each is a process of its own.
_RUNNER: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=2)


@flow(name="train", task_runner=_RUNNER, validate_parameters=False)  # type: ignore[arg-type]
def train(
    recipe: str,
    workspace: str = ".",
    overrides: Sequence[str] = (),
    reason: str = "manual",
    requested_by: str = "",
    quiet: bool = False,
    cause: Cause = "manual",
    request: str = "",
    measure_again: bool = False,
) -> Any:
    """Run a recipe in a workspace and return what came of it as JSON data.

    `requested_by` is the person who asked for it, who then cannot approve it; empty for a machine. What no person asked for
    (`cause`, with the `request` it came by: an alarm's id, or a run to take up again) runs when the governor grants it; else
    it ends as Skipped, saying why. `measure_again` times the engines anew, whatever was measured before.
    """
    chosen = named(recipe, Path(workspace), overrides)
    with governed(chosen, cause, request) as permit:
        if not permit.granted:
            return Completed(name="Skipped", message=permit.told["reason"], data=permit.told)
        permit.summary = _train(chosen, reason, requested_by, quiet, measure_again)
        return permit.summary


def _train(recipe: ChosenRecipe, reason: str, requested_by: str, quiet: bool, measure_again: bool) -> dict[str, Any]:
    with opened(recipe, reason, requested_by=requested_by, quiet=quiet) as run:
        steps.given_models(run)
        dataset = steps.validation(run)
        splits = steps.splitting(run, dataset)
        turns = divided(run, dataset)  # before a training that would be for nothing
        trained = steps.training(run, splits)
        checkpoint = steps.optimisation(run, trained, splits)
        graph = steps.graph(run, checkpoint)
        engines = steps.engines(run, checkpoint, graph, splits)
        evaluations = [steps.evaluation(run, engine, splits) for engine in engines]
        sliced = steps.slices(run, dataset, evaluations[0])
        corrupted = [steps.robustness(run, engine, splits) for engine in asked_corrupted(run, engines, evaluations)]
        measurements = steps.measurements(run, engines, splits, anew=measure_again)
        cost = steps.passes_cost(run, trained, engines, evaluations, splits)
        champion = steps.champion(run)
        compared = steps.evaluation_of_champion(run, champion, splits) if champion else None
        champion_corrupted = steps.robustness_of_champion(run, champion, splits) if champion else None
        found = (engines, evaluations, measurements, champion, compared, sliced, corrupted, champion_corrupted)
        verdict, release = served(run, partial(steps.gating, run, *found), engines, splits)  # gates, packages, asks a server
        shown = steps.evidence(run, engines, evaluations, verdict.record, champion, compared, sliced, splits, checkpoint)
        folds = estimated(run, dataset, turns)
        judged = (dataset, splits, checkpoint, engines, evaluations, measurements, champion, compared, verdict, release)
        results = Results(*judged, sliced, shown, folds, corrupted, champion_corrupted, cost)
        outcome = steps.registration(run, results)
        return summarise(run, results, outcome, write_report(run, results, outcome))
