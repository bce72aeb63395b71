"""The model card: what a user of the model has to know."""

from __future__ import annotations

from components.choosing import AUTO
from components.contracts.verdicts import Verdict
from components.contracts.wording import counted
from components.export import ExportConfig
from components.gating import policy
from flows.pages.figures import in_words
from flows.training.candidate_evidence import card_lines
from flows.training.passes_told import lines, passes_json
from flows.training.results import Results, evaluation_shown
from flows.training.run import Run
from flows.training.selective import rule_told
from flows.training.serving_check import SERVES

VERDICTS = {"pass": "candidate", "fail": "rejected", "inconclusive": "undecided"}
"""What a verdict makes of a model: what the test images do not decide was not rejected for what it is."""


def model_card(run: Run, results: Results, judged_before: str) -> str:
    """What a user of the model has to know, in Markdown; `judged_before` says how often the test set was used."""
    shown, checkpoint, verdict = evaluation_shown(results).record, results.checkpoint.record, results.verdict.record
    new, gone = results.classes_changed
    champion = f"the champion, version {results.current_champion.version}," if results.current_champion else ""
    lines = [
        f"# {run.config.model}",
        "",
        run.config.description,
        "",
        f"- Task: {checkpoint.task} into {counted(len(checkpoint.classes), 'class')}: {', '.join(checkpoint.classes)}",
        f"- Backbone: {checkpoint.backbone}; weights: {run.weights_told}; "
        f"trained: {', then '.join(phase.part for phase in run.config.training.all_phases)}",
        *([f"- Trained on: {checkpoint.computed_on}"] if checkpoint.computed_on else []),
        *([f"- Teacher: {run.taught_by}"] if run.taught_by else []),
        *_tuned(run),
        f"- Input: {checkpoint.preprocessing.width}x{checkpoint.preprocessing.height} pixels, "
        f"{counted(checkpoint.preprocessing.channels, 'channel')}, uint8; scaling is inside the engine",
        f"- Data version {run.data.dvc_hash}, git {run.lineage.git_commit}; "
        f"{counted(results.dataset.record.num_kept, 'image')} kept, {results.dataset.record.num_quarantined} quarantined",
        f"- Verdict: {VERDICTS[verdict.status]}; serving engine: {verdict.serving_engine}",
        *([f"- New classes, which {champion} does not know: {', '.join(new)}"] if new else []),
        *([f"- Classes that {champion} knows and this model does not: {', '.join(gone)}"] if gone else []),
        "",
        f"## Measured on the frozen test split, {shown.engine}, 95 % intervals",
        "",
        "| metric | value | interval | n |",
        "|---|---|---|---|",
        *(f"| {name} | {e.value:.4f} | {e.low:.4f} to {e.high:.4f} | {e.n} |" for name, e in shown.metrics.items()),
        "",
        f"{judged_before}.",
        "",
        *([f"{results.folds.told(run.task.headline)}.", ""] if results.folds else []),
        *_when_unsure(results),
        *(
            ["## Beside the champion", "", *(f"- {line}" for line in card_lines(results.shown.record)), ""]
            if results.shown
            else []
        ),
        *_passes(run, results),
        "## Which engine serves",
        "",
        *(f"- {line}" for line in choice_told(run.config.export, verdict)),
        "",
        "## Gates that judged it",
        "",
        *(f"- {line}" for line in _gates(run)),
        "",
        "## Limits",
        "",
        "These figures hold for images like the test split's. Nothing is claimed about other cameras, other classes or "
        "pictures that hold none of the classes.",
        "",
    ]
    return "\n".join(lines)


def _tuned(run: Run) -> list[str]:
    """Where the recipe's values come from, if from a search or a choice."""
    return [f"- {origin.told}" for origin in (run.config.tuned, run.config.chosen) if origin is not None]


def _passes(run: Run, results: Results) -> list[str]:
    """What passes removed, cost and bought; nothing without any."""
    told = lines(passes_json(results), in_words(run.task.headline))
    return ["## What was optimised", "", *(f"- {line}" for line in told), ""] if told else []


def _when_unsure(results: Results) -> list[str]:
    """When it answers and when not; nothing of a model that was refused, for which no rule was fitted."""
    if results.release is None:
        return []
    return ["## When it is unsure", "", *(f"- {line}" for line in rule_told(results.release.record.decision)), ""]


def choice_told(export: ExportConfig, verdict: Verdict) -> list[str]:
    """By what the engine that serves was chosen, every limit included, and what that made of each engine that passed."""
    if export.serving != AUTO:
        return [f"{verdict.serving_engine}: named by the recipe (export.serving); no limits chose it"]
    limits = {name: value for name, value in limits_json(export).items() if value is not None}
    within = ", ".join(f"{name} {value:g}" for name, value in limits.items()) or "(none)"
    found = [
        f"{e.engine}: {'' if f.gate == 'serving' else 'does not serve: '}{f.message}"
        for e in verdict.engines
        for f in e.findings
        if f.gate == "serving" or (f.gate, f.status) == (SERVES, "fail")
    ]
    return [
        f"left to the recipe's limits (export.serving: {AUTO}; export.limits: {within})",
        *(found or ["no engine passed every gate, so there was none to choose"]),
    ]


def limits_json(export: ExportConfig) -> dict[str, float | None]:
    """What the served engine is chosen within, as evidence and the ledger hold it."""
    return export.limits.model_dump(mode="json", exclude={"schema_version"})


def _said(value: object) -> str:
    """A setting for a reader, who knows no Python."""
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_said(one)}" for name, one in value.items()) + ")"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_said, value)) or "none"
    return "unset" if value is None else str(value)


def _gates(run: Run) -> list[str]:
    """One line a gate: its settings, defaults included, and the engines it judges."""
    settings = policy(run.config.gating)
    return [
        f"{chosen.gate}: {', '.join(f'{name} {_said(value)}' for name, value in settings[f'{index}:{chosen.gate}'].items())}"
        + (f" (only {', '.join(chosen.engines)})" if chosen.engines else "")
        for index, chosen in enumerate(run.config.gating.gates)
    ]
