"""The page of a study: one self-contained HTML file, made of the study's tables alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.contracts.verdicts import Estimate
from components.contracts.wording import counted
from components.intervals import difference
from components.phases import Phase
from components.search import Dimension
from components.store import write_atomically
from components.training import TrainingConfig
from flows.pages.figures import curves_figure, environment, in_words, prepare_figures
from flows.training.diagnosis import percent, phase_results, points
from flows.tuning.alarms import alarms
from flows.tuning.figures import history_figure, importance_figure, learning_figure, slices_figure
from flows.tuning.outcome import CAUTION, counts, fit_of, objective_name, own_json, share_of
from flows.tuning.space import Parameter, Value, shown
from flows.tuning.study import FEWEST, Study, Trial

PAGE = "report.html"


def write_page(study: Study, folder: Path) -> Path:
    """Write the study's page into its folder, as the study is now."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / PAGE, render(study).encode())
    return folder / PAGE


def render(study: Study) -> str:
    """HTML of the page."""
    told, best = study.described, study.best
    parameters = parameters_of(told)
    headline, num_valid = told.get("headline", "accuracy"), told.get("num_valid", 0)
    objective = objective_name(study, headline)
    own = {one.key: one.own for one in parameters if one.own is not None}
    facts: dict[str, Any] = {"best": None, "figures": {}}
    if best is not None:
        facts = _of_best(study, best, parameters, own, told, objective)
    return (
        environment()
        .get_template("study.html")
        .render(
            study=study.name,
            recipe=told.get("recipe", ""),
            counts=counts(study.trials),
            objective=objective,
            headline=in_words(headline),
            num_valid=num_valid,
            digest=study.digest(),
            alarms=[alarm.text for alarm in alarms(study.trials, parameters)],
            counted=counted,
            caution=CAUTION,
            parameters=parameters,
            trials=[_row(trial, best, parameters) for trial in study.trials],
            identity=sorted(study.identity.items()),
            **facts,
        )
    )


def parameters_of(told: Mapping[str, Any]) -> tuple[Parameter, ...]:
    """The parameters that a study was described with."""
    return tuple(
        Parameter(one["key"], Dimension.read(one["dimension"]), one["kind"], one["own"])
        for one in told.get("parameters", ())
    )


def _of_best(
    study: Study,
    best: Trial,
    parameters: Sequence[Parameter],
    own: Mapping[str, Value],
    told: Mapping[str, Any],
    objective: str,
) -> dict[str, Any]:
    """What is said of the best trial, and every figure."""
    headline, num_valid = told["headline"], told["num_valid"]
    phases = _config_of(best, told).all_phases
    share, importances = share_of(best, headline, num_valid), study.importances(parameters)
    beside = own_json(study, best, own if len(own) == len(parameters) else None, headline, num_valid)
    prepare_figures()
    figures = {
        "curves": _curves(best, phases, headline, num_valid),
        "history": history_figure(study.trials, best, objective, highest=study.direction == "maximize"),
        "slices": slices_figure(study.trials, parameters, best, own, objective),
        "learning": learning_figure(study.trials, best, objective),
        **({"importance": importance_figure(importances)} if importances else {}),
    }
    return {
        "best": best,
        "share": "" if share is None else f"{percent(share)}, n = {share.n}",
        "own": beside["told"] if beside else "",
        "fit": fit_of(best, phases, headline, num_valid),
        "chosen": [
            {
                "key": one.key,
                "value": shown(best.params[one.key]),
                "own": "" if one.own is None else shown(one.own),
                "range": _range(one),
            }
            for one in parameters
        ],
        "alone": _alone(study, parameters, own, headline, num_valid),
        "unimportant": _unimportant(study),
        "figures": figures,
    }


def _config_of(trial: Trial, told: Mapping[str, Any]) -> TrainingConfig:
    """What the trial trained, whose phases may differ from the recipe's."""
    return TrainingConfig.read(trial.facts.get("training") or told["training"])


def _curves(best: Trial, phases: Sequence[Phase], headline: str, num_valid: int) -> Any:
    history = best.facts["history"]
    results = phase_results(history, phases, headline, num_valid)
    return curves_figure(history, headline, [(one.part, one.last_epoch, one.best_epoch) for one in results])


def _unimportant(study: Study) -> str:
    complete = sum(trial.state == "complete" for trial in study.trials)
    if complete < FEWEST:
        return (
            f"How much each parameter matters is not told from {counted(complete, 'complete trial')}; it takes {FEWEST}, "
            f"and more say more."
        )
    return "All complete trials came to the same, so nothing tells one parameter from another."


def _alone(
    study: Study, parameters: Sequence[Parameter], own: Mapping[str, Value], headline: str, num_valid: int
) -> list[dict[str, Any]]:
    """The trials that differ from the recipe's own values in one parameter alone, and what that changed."""
    before = next((one for one in study.trials if one.params == own and one.state == "complete"), None)
    base = None if before is None else share_of(before, headline, num_valid)
    if base is None:
        return []
    found = []
    for trial in study.trials:
        differing = [one for one in parameters if trial.params[one.key] != own.get(one.key)]
        if len(differing) == 1 and trial.finished:
            (one,) = differing
            after = share_of(trial, headline, num_valid)
            told = trial.facts.get("reason") or "stopped early" if after is None else _change(after, base)
            found.append({"key": one.key, "number": trial.number, "value": shown(trial.params[one.key]), "told": told})
    return found


def _change(after: Estimate, before: Estimate) -> str:
    gap = difference(after, before)
    shows = "" if gap.low > 0 or gap.high < 0 else ": no difference is shown"
    return f"{points(gap, sign='+')}{shows}"


def _range(one: Parameter) -> str:
    if one.kind == "choice":
        return ", ".join(one.labels)
    step = f", in steps of {shown(one.dimension.step)}" if one.dimension.step is not None else ""
    return f"{shown(one.low)} to {shown(one.high)}{step}{', logarithmic' if one.dimension.log else ''}"


def _row(trial: Trial, best: Trial | None, parameters: Sequence[Parameter]) -> dict[str, Any]:
    seconds = trial.facts.get("seconds")
    return {
        "number": trial.number,
        "state": trial.state,
        "is_best": trial is best,
        "reason": trial.facts.get("reason") or "",
        "value": "" if trial.value is None else f"{trial.value:.4f}",
        "epochs": len(trial.curve),
        "seconds": "" if seconds is None else ("trained before" if trial.facts.get("cached") else f"{seconds:.1f}"),
        "chosen": [shown(trial.params[one.key]) for one in parameters],
    }
