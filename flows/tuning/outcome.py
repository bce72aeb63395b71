"""What a search came to, as JSON data and in words."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.contracts.verdicts import Estimate
from components.contracts.wording import counted
from components.intervals import difference, wilson
from components.phases import Phase
from flows.pages.figures import in_words
from flows.terminal import figure
from flows.training.diagnosis import fit_told, phase_results, points
from flows.training.results import estimate_json
from flows.tuning.searching import Search
from flows.tuning.space import Parameter, shown
from flows.tuning.study import Study, Trial


def summarise(search: Search, best: Trial, recipe: Path, page: Path, num_valid: int) -> dict[str, Any]:
    """What a search came to."""
    study, config = search.study, search.space.recipe.config
    assert config.search is not None
    return {
        "study": study.name,
        "digest": study.digest(),
        "recipe": config.name,
        "model": config.model,
        "objective": objective_name(study, search.headline),
        "trials": counts(study.trials),
        "best": best_json(best, search.headline, num_valid),
        "own": own_json(study, best, search.space.own, search.headline, num_valid),
        "fit": fit_of(best, search.space.config(best.params).training.all_phases, search.headline, num_valid),
        "importances": study.importances(search.space.parameters),
        "alarms": [alarm.text for alarm in search.alarms],
        "winner": recipe.stem,
        "file": str(recipe),
        "page": str(page),
        "new_trials": search.new,
    }


def objective_name(study: Study, headline: str) -> str:
    """What a study compares, as people read it."""
    return f"valid {in_words(headline)}" if study.direction == "maximize" else "valid loss"


def counts(trials: Sequence[Trial]) -> dict[str, int]:
    """How many trials there are in each state."""
    found = Counter(trial.state for trial in trials)
    return {state: found.get(state, 0) for state in ("complete", "pruned", "failed", "running")}


def share_of(trial: Trial, headline: str, num_valid: int) -> Estimate | None:
    """The share of valid images that a trial's best epoch answers right, with its interval."""
    value = trial.facts.get("valid", {}).get(headline)
    return None if value is None else wilson(round(value * num_valid), num_valid)


def best_json(best: Trial, headline: str, num_valid: int) -> dict[str, Any]:
    share = share_of(best, headline, num_valid)
    assert share is not None
    return {
        "trial": best.number,
        "value": best.value,
        headline: estimate_json(share),
        "valid_loss": best.loss,
        "params": best.params,
        "weights": best.facts.get("weights"),
    }


def own_json(
    study: Study, best: Trial, own: Mapping[str, Any] | None, headline: str, num_valid: int
) -> dict[str, Any] | None:
    """The trial of the recipe's own values beside the best one, in words that the numbers support; None without one."""
    found = next((trial for trial in study.trials if trial.params == own and trial.state == "complete"), None)
    if found is None:
        return None
    before, after = share_of(found, headline, num_valid), share_of(best, headline, num_valid)
    assert before is not None
    assert after is not None
    if found is best:
        return {
            "trial": found.number,
            "value": found.value,
            "told": "nothing that was tried is better than the recipe itself",
        }
    gap = difference(after, before)
    told = (
        f"{points(gap, sign='+')} of {counted(num_valid, 'valid image')} over the recipe's own values, trial {found.number}"
        + ("" if gap.low > 0 else "; no difference is shown")
    )
    return {"trial": found.number, "value": found.value, "told": told}


def fit_of(best: Trial, phases: Sequence[Phase], headline: str, num_valid: int) -> list[str]:
    """Whether the winner over- or under-fits, in words."""
    history: list[dict[str, float]] = best.facts["history"]
    return fit_told(phase_results(history, phases, headline, num_valid), phases, headline)


CAUTION = (
    "The best of many is flattered by what was lucky on the same valid images; what it is worth, the gates say on the test "
    "images, about which no trial was asked."
)


def told(summary: Mapping[str, Any], parameters: Sequence[Parameter]) -> str:
    """The summary as text."""
    best, states = summary["best"], summary["trials"]
    headline = next(key for key, value in best.items() if isinstance(value, dict) and "low" in value)
    several = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    lines = [
        f"study {summary['study']}: {several}; best in {summary['objective']}: trial {best['trial']}, valid "
        f"{in_words(headline)} {figure(best[headline])}, valid loss {best['valid_loss']:.4f}",
        *(f"  {parameter.key} = {shown(best['params'][parameter.key])}" for parameter in parameters),
        *([f"  {summary['own']['told']}"] if summary["own"] else []),
        *(f"  {line}" for line in summary["fit"]),
        *(f"  ALARM: {text}" for text in summary["alarms"]),
        f"  {CAUTION}",
    ]
    if summary["importances"]:
        shares = ", ".join(f"{key} {share:.0%}" for key, share in summary["importances"].items())
        lines.append(f"  what goes with the differences (PED-ANOVA): {shares}")
    lines += [
        f"page    {os.path.relpath(summary['page'])}",
        f"recipe  {os.path.relpath(summary['file'])}; next: visionloop train --recipe {summary['winner']}",
    ]
    return "\n".join(lines)
