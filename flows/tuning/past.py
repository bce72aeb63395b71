"""What was searched, told from the study's tables alone: the recipe may have been changed since."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from components.contracts.errors import UnknownName
from components.contracts.wording import counted
from flows.tuning.outcome import best_json, counts, objective_name
from flows.tuning.page import write_page
from flows.tuning.space import shown
from flows.tuning.study import Study, heads
from flows.workspace.recipes import expect_plain_name
from flows.workspace.settings import read_settings
from flows.workspace.workspace import Workspace


def past_studies(workspace: Workspace) -> list[dict[str, Any]]:
    """The studies of the workspace's database, the first first; raises RegistryUnavailable."""
    url = read_settings(workspace.state).studies_url
    found = []
    for head in heads(url):
        study = Study(url, head.name, patience_s=0)
        study.open()
        best = study.best
        found.append(
            {
                "study": head.name,
                "recipe": head.told.get("recipe", ""),
                "model": head.identity.get("model", ""),
                "trials": counts(study.trials),
                "best": None if best is None else {"trial": best.number, "value": best.value},
                "digest": study.digest(),
            }
        )
    return found


def told_study(study: Mapping[str, Any]) -> str:
    """A study as a line."""
    several = ", ".join(f"{count} {state}" for state, count in study["trials"].items() if count) or "no trial yet"
    best = f"best {study['best']['value']:.4f} (trial {study['best']['trial']})" if study["best"] else ""
    return f"{study['study']:24} {study['recipe']:16} {several:36} {best}".rstrip()


def shown_study(workspace: Workspace, name: str) -> dict[str, Any]:
    """A study with its trials; raises UnknownName, RegistryUnavailable."""
    url = read_settings(workspace.state).studies_url
    expect_plain_name(name)  # its page has a folder of that name
    known = [head.name for head in heads(url)]
    if name not in known:
        raise UnknownName("study", name, known)
    study = Study(url, name, patience_s=0)
    study.open()
    told, best = study.described, study.best
    page = write_page(study, workspace.studies / name) if told else None
    return {
        "page": None if page is None else str(page),
        "study": name,
        "recipe": told.get("recipe", ""),
        "objective": objective_name(study, told.get("headline", "accuracy")),
        "digest": study.digest(),
        "identity": study.identity,
        "trials": [
            {
                "trial": trial.number,
                "state": trial.state,
                "value": trial.value,
                "params": trial.params,
                "epochs": len(trial.curve),
                "valid_loss": trial.loss if math.isfinite(trial.loss) else None,
                **{key: trial.facts.get(key) for key in ("seconds", "reason", "weights")},
            }
            for trial in study.trials
        ],
        "best": best_json(best, told["headline"], told["num_valid"]) if best is not None and told else None,
    }


def told_trials(found: Mapping[str, Any]) -> list[str]:
    """The trials of a study, a line each."""
    best = found["best"]["trial"] if found["best"] else None
    lines = [f"study {found['study']} of recipe {found['recipe']}, {found['objective']}; digest {found['digest']}"]
    for trial in found["trials"]:
        value = f"{trial['value']:.4f}" if trial["value"] is not None else trial["state"]
        chosen = ", ".join(f"{key} {shown(value)}" for key, value in trial["params"].items())
        marked = "*" if trial["trial"] == best else " "
        why = f"  ({trial['reason']})" if trial["reason"] else ""
        lines.append(f"{marked} {trial['trial']:4}  {value:>10}  {counted(trial['epochs'], 'epoch'):10}  {chosen}{why}")
    return [*lines, *([f"page  {found['page']}"] if found["page"] else [])]
