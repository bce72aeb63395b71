"""All that a person looks at before deciding on a version, in the order in which it is asked."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from components.contracts.errors import VisionloopError
from components.contracts.evidence import CandidateEvidence
from components.contracts.releases import CriticalClass
from components.contracts.verdicts import Evaluation
from components.contracts.wording import shown_utc
from components.selective import rows as risk_coverage_rows
from flows.console.application import Application
from flows.console.promoting import Promoting
from flows.console.queue import status_word
from flows.console.rendering import ago
from flows.console.visitors import Visitor
from flows.pages.figures import epochs_of
from flows.terminal import figure
from flows.training.candidate_evidence import corruptions
from flows.training.candidate_evidence import page as evidence_page
from flows.training.data_since import told as data_told
from flows.training.engine_table import cell, engine_row, metric_names
from flows.training.passes_told import page as passes_page
from flows.training.registered import RegisteredEvidence, registered_evidence
from flows.training.results import costs_json
from flows.training.run import stage_folder
from flows.training.selective import aurc_told
from flows.up.processes import Up
from flows.workspace.versions import Row, State, VersionShown, history, same_person, show

DATA_DOCS = "data_docs"
_CLASSES = 30
"""Classes that the page shows, the weakest first; a page of their own shows all."""
_CONFUSED = 12
_NAMED = 24
"""Digits of a digest in the name of a picture."""
_DRAWN_CLASSES = 200
"""Of a confusion matrix; more cannot be told apart in a drawing."""


def address_of(model: str, version: str) -> str:
    """The page of a version."""
    return f"/models/{quote(model, safe='')}/versions/{quote(version, safe='')}"


def seen(shown: VersionShown) -> str:
    """What a decision is about: a later row of the version, or another champion, is something else than was looked at."""
    state = shown.state
    rows = [state.requested, state.decision, *state.exceptions.values(), state.promoted, state.left, shown.champion]
    return "-".join(str(row.seq) if row is not None else "0" for row in rows)


def candidate_page(application: Application, visitor: Visitor, model: str, version: str) -> dict[str, Any]:
    """What the template draws; raises UnknownName. Evidence that is away is told, and all that the ledger holds is shown."""
    desk = application.desk(model)
    shown = show(desk, version)
    state, now = shown.state, application.ledger.now()
    summary = state.requested.body.get("summary") or {}
    found: RegisteredEvidence | None = None
    erased: frozenset[str] = frozenset()
    problem = ""
    try:
        erased = application.erased()  # first: while that cannot be told no picture may be shown
        found = registered_evidence(desk, state)
    except VisionloopError as error:
        problem = str(error)
    headline = summary.get("headline", "accuracy")
    word, badge = status_word(state)
    promoting = application.promotions.of(model, version)
    return {
        "model": model,
        "version": version,
        "address": address_of(model, version),
        "state": state,
        "word": word,
        "badge": badge,
        "since": ago(state.requested.at, now),
        "sentence": (summary.get("evidence") or {}).get("sentence", ""),
        "summary": summary,
        "headline": headline,
        "evidence_problem": problem,
        "notes": _notes(shown),
        "seen": seen(shown),
        "actions": _actions(shown, visitor, promoting),
        "why_not": _why_not(shown, visitor),
        "promoting": promoting if promoting is not None and not promoting.ended else None,
        "promotion_error": promoting.error if promoting is not None and promoting.ended else "",
        "running_for": ago(promoting.since, now) if promoting is not None else "",
        "before": _before(shown),
        "beside": _beside(summary),
        "compared_with": _compared_with(shown, summary),
        "findings": _findings(summary),
        "passes": passes_page(summary.get("optimisation"), headline.replace("_", " ")),
        "data_told": data_told(summary.get("data_since"), summary.get("spent")),
        "decision_rule": _rule(summary),
        "bound": _bound(state),
        "rows": _rows(history(desk), state),
        "comments": application.comments.of(model, version),
        "links": _links(application, model, version, summary),
        **_drawn(found, headline, address_of(model, version), erased),
    }


def _notes(shown: VersionShown) -> list[str]:
    notes = list(shown.notes)
    summary = shown.state.requested.body.get("summary") or {}
    if shown.holdout is not None and summary:
        notes.append(f"{shown.holdout.told(summary['images']['test'])}.")
    if shown.same_account:
        notes.append(f"{shown.same_account[0].upper()}{shown.same_account[1:]}.")
    return notes


def _actions(shown: VersionShown, visitor: Visitor, promoting: Promoting | None) -> list[str]:
    """What the visitor may do about the version now."""
    state = shown.state
    if not visitor.may("approver") or (promoting is not None and not promoting.ended):
        return []
    own = asked_for_by(visitor, state)
    found = []
    if state.status in ("waiting", "expired", "retired") and not state.missing and shown.is_fresh and not own:
        found.append("approve")
    if state.missing and state.status in ("undecided", "expired", "retired") and shown.is_fresh and not own:
        found.append("except")
    if state.status == "approved" and shown.is_fresh:
        found.append("promote")
    if state.status in ("undecided", "waiting", "expired", "approved"):
        found.append("reject")
    if state.status == "retired":
        found.append("rollback")
    return found


def asked_for_by(visitor: Visitor, state: State) -> bool:
    """Whether the visitor, by any of their names, asked for the training; where names are only declared, nobody is sure."""
    return any(same_person(name, state.requested.actor) for name in (visitor.name, *visitor.also) if name)


def _why_not(shown: VersionShown, visitor: Visitor) -> list[str]:
    """Why a decision that one might expect cannot be made here."""
    found = []
    state = shown.state
    if state.status in ("undecided", "waiting", "expired", "approved") and not shown.is_fresh:
        now = f"version {shown.champion.body['version']}" if shown.champion else "none"
        found.append(
            f"It was not compared with today's champion ({now}), so it can no longer be approved or promoted. Train again."
        )
    if state.status in ("undecided", "waiting", "expired") and asked_for_by(visitor, state):
        found.append("You asked for this training, so a second person has to approve it.")
    if not visitor.may("approver"):
        found.append(f"Decisions are made by approvers; you are signed in as {visitor.role}.")
    return found


def _before(shown: VersionShown) -> str:
    """The version that was champion before this one, where this one is: what a person goes back to."""
    previous = shown.champion.body.get("previous") if shown.champion is not None else None
    return str(previous["version"]) if previous and shown.state.status == "champion" else ""


def _beside(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    champion = summary.get("champion") or {}
    return [
        {"name": name.replace("_", " "), "ours": estimate, "champion": champion.get(name)}
        for name, estimate in (summary.get("metrics") or {}).items()
    ]


def _compared_with(shown: VersionShown, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The champion that it was compared with, and what keeps the two from being compared whole."""
    then = shown.compared_with
    version = summary.get("champion_version") or (str(then.body["version"]) if then is not None else "")
    today = str(shown.champion.body["version"]) if shown.champion is not None else ""
    return {
        "version": version,
        "none": shown.state.requested.body["bound"].get("champion", "none") == "none",
        "today": today if today not in (version, shown.state.version) else "",
        "reason": summary.get("champion_reason") or "",
        "new": summary.get("classes_new") or [],
        "gone": summary.get("classes_gone") or [],
        "images": summary.get("champion_images"),
    }


_ORDER = {"fail": 0, "inconclusive": 1, "not executed here": 2, "not applicable": 3, "pass": 4}
_BADGES = {"pass": "pass", "fail": "fail", "inconclusive": "unsure"}


def _findings(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Gates in words by engine, the serving one first; what did not pass stands before what did."""
    by_engine: dict[str, list[dict[str, Any]]] = {}
    for finding in summary.get("findings") or []:
        badge = _BADGES.get(finding["status"], "idle")
        by_engine.setdefault(finding["engine"], []).append({**finding, "badge": badge})
    serving = summary.get("serving_engine")
    return [
        {
            "engine": engine,
            "is_serving": engine == serving,
            "passed": sum(each["status"] == "pass" for each in findings),
            "asked": sum(each["status"] != "not applicable" for each in findings),
            "findings": sorted(findings, key=lambda each: _ORDER.get(each["status"], 2)),
        }
        for engine, findings in sorted(by_engine.items(), key=lambda item: item[0] != serving)
    ]


def _rule(summary: Mapping[str, Any]) -> list[str]:
    rule = summary.get("decision")
    if not rule:
        return []
    accuracy = f", accuracy on them {figure(rule['accuracy'])}" if rule["accuracy"] else ""
    return [
        f'Answers below confidence {rule["threshold"]:.3f} are "unsure": it answers {figure(rule["coverage"])} of the test '
        f"images{accuracy}.",
        *(f"{CriticalClass.read(each).told()}." for each in rule.get("critical", [])),
    ]


def _bound(state: State) -> list[tuple[str, str]]:
    bound = state.requested.body["bound"]
    names = ("data", "split", "weights", "policy", "release", "champion", "shown", "slices")
    return [
        *((name, str(bound[name])) for name in names if name in bound),
        *((f"engine {name}", digest) for name, digest in bound["engines"].items()),
    ]


def _rows(rows: list[Row], state: State) -> list[Row]:
    """What the ledger says of this version."""
    first = state.requested
    return [row for row in rows if row.entry.seq >= first.seq and row.entry.body.get("version") == state.version]


def _links(application: Application, model: str, version: str, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    pages = Up(application.workspace, application.settings).addresses()
    mlflow = application.settings.tracking_uri if not application.settings.tracking_is_local else pages.get("MLflow")
    if mlflow:
        found.append(("this version in MLflow", f"{mlflow}/#/models/{quote(model, safe='')}/versions/{version}"))
    if pages.get("Prefect"):
        found.append(("flow runs in Prefect", f"{pages['Prefect']}/runs"))
    run = str(summary.get("run", ""))
    folder = application.workspace.runs / run
    if run and (folder / "report.html").is_file():
        found.append(("the report of the run", f"/runs/{quote(run, safe='')}/report.html"))
    docs = folder / stage_folder("validation") / DATA_DOCS
    # The index of data docs is drawn by scripts from a network; what each suite found stands in its own page.
    for path in sorted(docs.glob("validations/*/*/*/*.html")) if run else ():
        place = quote(path.relative_to(docs).as_posix())
        found.append(
            (
                f"data docs: {path.parents[2].name}",
                f"/runs/{quote(run, safe='')}/data-docs/{docs_key(application, run)}/{place}",
            )
        )
    return found


def docs_key(application: Application, run: str) -> str:
    """What the address of a run's data docs carries in place of a session, as long as this process lives."""
    return hmac.new(application.secret, f"data docs of {run}".encode(), hashlib.sha256).hexdigest()


def _drawn(
    found: RegisteredEvidence | None,
    headline: str,
    address: str,
    erased: frozenset[str],
) -> dict[str, Any]:
    """What only the evidence tells; nothing of it where that is away."""
    nothing: dict[str, Any] = {
        "evidence": None,
        "corruptions": None,
        "engines": [],
        "metrics": [],
        "per_class": [],
        "num_classes": 0,
    }
    nothing |= {"confused": [], "figures": [], "risk_coverage": [], "aurc": "", "machine": "", "n_test": 0}
    if found is None:
        return nothing
    metrics = metric_names([stored.record for stored in found.evaluations], headline)
    price = hourly_price(found)
    measured = {stored.record.engine: stored.record for stored in found.measurements}
    answered = {stored.record.engine: stored.record for stored in found.evaluations}
    serving = found.serving
    return {
        "evidence": shown_evidence(found.shown, address, erased) if found.shown else None,
        "corruptions": corruptions(found.robustness, found.champion_robustness),
        "engines": [
            engine_row(e, answered[e.name], measured[e.name], metrics, costs_json(measured[e.name], price))
            for e in (stored.record for stored in found.engines)
            if e.name in answered and e.name in measured
        ],
        "metrics": [name.replace("_", " ") for name in metrics],
        "per_class": class_rows(found, most=_CLASSES),
        "num_classes": len(serving.per_class),
        "confused": confused(serving),
        "figures": figure_names(found),
        "risk_coverage": risk_coverage_rows(found.risk_coverage) if found.risk_coverage else [],
        "aurc": aurc_told(found.risk_coverage) if found.risk_coverage else "",
        "machine": found.measurements[0].record.machine if found.measurements else "",
        "n_test": serving.num_images,
    }


def hourly_price(found: RegisteredEvidence) -> float | None:
    """What an hour of the machine costs, as the recipe said."""
    path = found.folder / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    price = (config.get("export") or {}).get("hourly_price")
    return float(price) if price is not None else None


def shown_evidence(shown: CandidateEvidence, address: str, erased: frozenset[str]) -> dict[str, Any]:
    """Flips, surest errors and slices; a picture that was erased since is not shown, and that is said."""

    def there(name: str) -> str:
        return f"{address}/pictures/{quote(name)}" if name and not is_erased(name, erased) else ""

    drawn = evidence_page(shown, there)
    return {**drawn, "num_erased": sum(one.sha256 in erased for one in shown.pictures)}


def is_erased(name: str, erased: frozenset[str]) -> bool:
    """Whether a file of the evidence, which is named by the beginning of a picture's digest, is of one that was erased."""
    stem = PurePosixPath(name).stem
    return len(stem) >= _NAMED and any(sha256.startswith(stem) for sha256 in erased)


def class_rows(found: RegisteredEvidence, *, most: int | None = None) -> list[dict[str, Any]]:
    """Classes with their precision, recall and F1, the weakest recall first."""
    per_class = sorted(found.serving.per_class, key=lambda each: (each.recall.value, each.name))[:most]
    champion = {each.name: each for each in found.champion.per_class} if found.champion else {}
    trained = found.splits.class_counts.get("train", {})
    return [
        {
            "name": each.name,
            "num_train": trained.get(each.name, ""),
            "support": each.support,
            "cells": [cell(e) for e in (each.precision, each.recall, each.f1)],
            "champion": f"{champion[each.name].recall.value:.4f}" if each.name in champion else "",
        }
        for each in per_class
    ]


def confused(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The pairs of classes that were taken for one another most often."""
    names = [each.name for each in evaluation.per_class]
    pairs = [
        (count, names[true], names[said], sum(row))
        for true, row in enumerate(evaluation.confusion)
        for said, count in enumerate(row)
        if count and true != said and said < len(names)
    ]
    return [
        {"true": true, "said": said, "count": count, "of": of}
        for count, true, said, of in sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2]))[:_CONFUSED]
    ]


def figure_names(found: RegisteredEvidence) -> list[tuple[str, str]]:
    """The drawings that there are, with what they show."""
    serving = found.serving
    names = [("engines", "The engines' accuracy, with intervals"), ("pareto", "Accuracy against latency of every engine")]
    if 0 < len(serving.confusion) <= _DRAWN_CLASSES:
        names.append(("confusion", "Confusion: true classes against predicted ones"))
    if serving.reliability:
        names.append(("reliability", "Calibration: accuracy by confidence"))
    if found.risk_coverage is not None:
        names.append(("risk_coverage", "Risk against coverage, by threshold"))
    if epochs_of(found.history):
        names.append(("curves", "Losses and accuracy by epoch"))
    return names


def told_row(row: Row) -> dict[str, Any]:
    """A row of the ledger for a table."""
    entry = row.entry
    why = entry.body.get("reason") or "; ".join(entry.body.get("reasons", []))
    if entry.kind == "excepted":
        why = f"{', '.join(entry.body['gates'])}: {why}"
    kind = entry.kind.replace("_", " ")
    if row.by_gates:
        kind = "undecided by the gates" if entry.body.get("status") == "inconclusive" else "rejected by the gates"
    return {
        "seq": entry.seq,
        "at": shown_utc(entry.at),
        "kind": kind,
        "version": str(entry.body.get("version", "")),
        "by": entry.actor.name,
        "method": entry.actor.method,
        "why": why,
    }
