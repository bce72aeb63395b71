"""What a run leaves behind: the bundle that is registered, the summary and the report."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from components.choosing import AUTO
from components.contracts.data import SPLITS
from components.contracts.evidence import CandidateEvidence
from components.contracts.records import Record, Stored, canonical_json, sha256_text
from components.contracts.verdicts import Outcome, Rejection, Undecided
from components.gating import policy
from components.samples import rows
from components.store import sha256_file, write_atomically
from flows.training.candidate_evidence import evidence_json
from flows.training.data_since import data_since, spent
from flows.training.keys import training_key
from flows.training.model_card import choice_told, limits_json, model_card
from flows.training.passes_told import passes_json
from flows.training.results import (
    Results,
    bound_digests,
    candidate_digest,
    costs_json,
    estimate_json,
    estimates_json,
    folds_json,
    folds_proposed,
    headline_json,
)
from flows.training.run import Run
from flows.training.selective import curve_of
from registry.approval import person
from registry.holdout import holdout_use
from registry.ledger import Ledger
from registry.models import CHAMPION_CORRUPTED, CandidateBundle
from registry.policies import exceptions_told, notes
from registry.tracking import DataInput


def assemble(run: Run, results: Results) -> CandidateBundle:
    """The bundle of a candidate: weights, engines, evidence, report and model card."""
    from flows.training.report import render

    verdict = results.verdict.record
    folder = run.folder / ".bundle"
    folder.mkdir(exist_ok=True)
    files: dict[str, Path] = {}

    def document(name: str, text: str) -> None:
        path = folder / name.replace("/", "-")
        path.write_text(text)
        files[name] = path

    def record(name: str, value: Record) -> None:
        document(f"evidence/{name}.json", json.dumps(value.to_json(), indent=1))

    checkpoint = results.checkpoint
    files["checkpoint/weights.safetensors"] = checkpoint.folder / checkpoint.record.weights.name
    record("checkpoint", checkpoint.record)
    record("dataset", results.dataset.record)
    record("splits", results.splits.record)
    record("verdict", verdict)
    document("evidence/config.json", json.dumps(run.config.to_json(), indent=1))
    told = {**recorded_policy(run, results), "choice": choice_told(run.config.export, verdict)}
    document("evidence/policy.json", json.dumps(told, indent=1))
    document("evidence/lineage.json", json.dumps(run.lineage.to_json(), indent=1))
    if run.teacher is not None:
        said = {"checkpoint": run.teacher.digest, "weights": run.teacher.weights, "told": run.taught_by}
        document("evidence/teacher.json", json.dumps(said, indent=1))
    files["evidence/splits.parquet"] = results.splits.folder / results.splits.record.table.name
    files["evidence/history.json"] = checkpoint.folder / checkpoint.record.history.name
    for stored in results.engines:
        for file in stored.record.files:
            files[f"engines/{stored.record.name}/{file.name}"] = stored.folder / file.name
        record(f"{stored.record.name}.engine", stored.record)
    for evaluation, measurement in zip(results.evaluations, results.measurements, strict=True):
        name = evaluation.record.engine
        record(f"{name}.evaluation", evaluation.record)
        record(f"{name}.measurement", measurement.record)
        if evaluation.record.predictions is not None:
            files[f"evidence/{name}.predictions.parquet"] = evaluation.folder / evaluation.record.predictions.name
        if evaluation.record.beyond_test is not None:
            files[f"evidence/{name}.beyond_test.parquet"] = evaluation.folder / evaluation.record.beyond_test.name
    if results.slices is not None:
        record("slices", results.slices.record)
        files[f"evidence/{results.slices.record.table.name}"] = results.slices.folder / results.slices.record.table.name
    if results.shown is not None:
        record("shown", results.shown.record)
        files["evidence/shown.zip"] = _zipped(results.shown, folder / "shown.zip")
    for asked in results.corrupted:
        record(f"{asked.record.engine}.robustness", asked.record)
        if asked.record.answers is not None:
            files[f"evidence/{asked.record.engine}.{asked.record.answers.name}"] = asked.folder / asked.record.answers.name
    if checkpoint.record.optimised is not None:
        history = checkpoint.record.optimised.history
        files[f"evidence/{history.name}"] = checkpoint.folder / history.name
    if results.passes_cost is not None:
        record("passes_cost", results.passes_cost.record)
    if results.champion is not None:
        record("champion.evaluation", results.champion.record)
    if results.champion_corrupted is not None:
        record(CHAMPION_CORRUPTED, results.champion_corrupted.record)
    if results.folds is not None:
        record("folds", results.folds)
    if results.release is not None:
        record("release", results.release.record)
        for file in (results.release.record.reference, results.release.record.golden):
            files[f"release/{file.name}"] = results.release.folder / file.name
    if (curve := curve_of(run, results)) is not None:
        record("risk_coverage", curve)
    judged_before = holdout_told(run, results)
    document("model-card.md", model_card(run, results, judged_before))
    document("report.html", render(run, results, None, notes_of(run, results), judged_before))
    return CandidateBundle(
        model=run.config.model,
        candidate_digest=candidate_digest(run, results),
        training_key=training_key(run, results.splits),
        verdict=verdict,
        files=files,
        tags=_tags(run, results),
        params=_flat(run.config.to_json()) | _computed_on(results),
        metrics=_metrics(run, results),
        history=results.history,
        bound=bound_digests(results),
        summary=_for_approver(run, results),
        requester=person(run.requested_by) if run.requested_by else None,
        inputs=_inputs(run, results),
    )


def _zipped(shown: Stored[CandidateEvidence], path: Path) -> Path:
    """The pictures and tables of the evidence in one file, the same for the same evidence."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(shown.record.files, key=lambda one: one.name):
            archive.writestr(zipfile.ZipInfo(file.name), (shown.folder / file.name).read_bytes())
    return path


def _inputs(run: Run, results: Results) -> list[DataInput]:
    """The splits of the run; a digest is of the split's images and labels, so the test split's is its `test_digest`."""
    splits = results.splits
    source = {
        "visionloop.data": run.data.dvc_hash,
        "visionloop.test_ledger": run.data.ledger_sha256,
        "mlflow.source.git.commit": run.lineage.git_commit,
    }
    found = []
    for name in SPLITS:
        table = rows(splits, name)
        told = [list(splits.record.classes), *zip(table["sha256"], table["label"], strict=True)]
        digest = sha256_text(canonical_json(told))
        found.append(DataInput(name, digest, splits.record.class_counts[name], source))
    return found


def corrupted_json(run: Run, results: Results) -> dict[str, Any]:
    """By engine, the share of right answers on corrupted images: in the mean, by variant, and what stayed unchanged."""
    return {
        record.engine: {
            f"mean_{run.task.headline}": estimate_json(record.corrupted),
            run.task.headline: {variant: estimate_json(each) for variant, each in record.right.items()},
            "unchanged": {behaviour: estimate_json(each) for behaviour, each in record.unchanged.items()},
        }
        for record in (stored.record for stored in results.corrupted)
        if record.corrupted is not None
    }


def _for_approver(run: Run, results: Results) -> dict[str, Any]:
    """What a person reads before deciding: the serving engine's figures beside the champion's, and what the gates said."""
    verdict = results.verdict.record
    serving = next(e.record for e in results.evaluations if e.record.engine == verdict.serving_engine)
    latency = next(m.record for m in results.measurements if m.record.engine == verdict.serving_engine)
    engine = next(e.record for e in results.engines if e.record.name == verdict.serving_engine)
    champion = results.champion.record if results.champion else None
    new, gone = results.classes_changed
    return {
        "run": run.id,
        "reason": run.reason,
        "recipe": run.lineage.recipe,
        **({"tuned": run.config.tuned.to_json()} if run.config.tuned else {}),
        **({"chosen": run.config.chosen.to_json()} if run.config.chosen else {}),
        "git": run.lineage.git_commit + (" with uncommitted changes" if run.lineage.git_dirty else ""),
        "data_version": run.data.dvc_hash,
        "images": dict(results.splits.record.counts),
        **({"teacher": run.taught_by} if run.taught_by else {}),
        "classes": list(results.checkpoint.record.classes),
        "serving_engine": verdict.serving_engine,
        **headline_json(run),
        "metrics": estimates_json(serving),
        "recall": {c.name: estimate_json(c.recall) for c in serving.per_class},
        "champion": estimates_json(champion) if champion else None,
        "champion_version": results.current_champion.version if results.current_champion else None,
        "champion_images": champion.num_images if champion else None,
        "champion_reason": champion.reason if champion else "",
        "classes_new": new,
        "classes_gone": gone,
        "data_notes": results.data_notes,
        "latency_p50_ms": latency.latency_p50_ms,
        "latency_p99_ms": latency.latency_p99_ms,
        "machine": latency.machine,
        "size_bytes": engine.size_bytes,
        "folds": folds_json(run, results),
        "evidence": evidence_json(results.shown.record) if results.shown else None,
        "computed_on": results.checkpoint.record.computed_on,
        **({"optimisation": passes} if (passes := passes_json(results)) else {}),
        "data_since": data_since(run, results),
        "spent": spent(run, results),
        "decision": results.release.record.decision.to_json() if results.release else None,
        "findings": [
            {"engine": e.engine, "gate": f.gate, "status": f.status, "message": f.message}
            for e in verdict.engines
            for f in e.findings
        ],
        "policy": recorded_policy(run, results),
    }


def recorded_policy(run: Run, results: Results) -> dict[str, Any]:
    """All that the gates were told, defaults included, as the ledger keeps it for later comparison."""
    verdict = results.verdict.record
    settings = policy(run.config.gating)
    return {
        "gates": [
            {"gate": chosen.gate, "engines": list(chosen.engines), "settings": settings[f"{index}:{chosen.gate}"]}
            for index, chosen in enumerate(run.config.gating.gates)
        ],
        "engines": {engine.engine: {"required": engine.required} for engine in verdict.engines},
        "serving": verdict.serving_engine,
        **({"limits": limits_json(run.config.export)} if run.config.export.serving == AUTO else {}),
    }


def notes_of(run: Run, results: Results) -> list[str]:
    """What the reader of the report has to know of earlier policies, and of rejections of the same weights."""
    entries = Ledger(run.settings.ledger_url).entries(run.config.model)
    summary = {"policy": recorded_policy(run, results), "data_notes": results.data_notes}
    body = {"bound": bound_digests(results), "summary": summary}
    subject = candidate_digest(run, results)
    signed = [entry for entry in entries if entry.kind == "excepted" and entry.subject == subject]
    return [*notes(entries, body, subject=subject), *exceptions_told(signed)]


def holdout_told(run: Run, results: Results) -> str:
    """How often the test set was used, by the ledger: whatever a model is called, the pictures are the same."""
    entries = Ledger(run.settings.ledger_url).entries()
    splits = results.splits.record
    use = holdout_use(entries, split=splits.test_digest, subject=candidate_digest(run, results))
    return use.told(splits.counts["test"])


def _tags(run: Run, results: Results) -> dict[str, str]:
    # Run, data and commit have the shorter names below, which the run of the training has as well.
    named = ("schema_version", "run_id", "data_version", "git_commit")
    lineage = {f"visionloop.{name}": str(value) for name, value in run.lineage.to_json().items() if name not in named}
    return lineage | {
        "visionloop.run": run.id,
        "visionloop.data": run.data.dvc_hash,
        "visionloop.git": run.lineage.git_commit,
        "visionloop.test_digest": results.splits.record.test_digest,
        "visionloop.weights_sha256": results.checkpoint.record.weights.sha256,
        **({"visionloop.teacher": run.teacher.digest} if run.teacher else {}),
        "visionloop.serving_engine": results.verdict.record.serving_engine,
    }


def _metrics(run: Run, results: Results) -> dict[str, float]:
    found: dict[str, float] = {}
    for evaluation, measurement in zip(results.evaluations, results.measurements, strict=True):
        name = evaluation.record.engine
        found |= {f"evaluation.{name}.{metric}": e.value for metric, e in evaluation.record.metrics.items()}
        for percentile in ("p50", "p90", "p99"):
            value = getattr(measurement.record, f"latency_{percentile}_ms")
            if value is not None:
                found[f"evaluation.{name}.latency_{percentile}_ms"] = value
    for shown in results.corrupted:
        if shown.record.corrupted is not None:
            found[f"evaluation.{shown.record.engine}.corrupted_{run.task.headline}"] = shown.record.corrupted.value
    return found


def _computed_on(results: Results) -> dict[str, str]:
    """Beside the recipe's settings of `training.compute`, what they came out as; nothing for a processor in fp32."""
    told = results.checkpoint.record.computed_on
    return {"training.computed_on": told} if told else {}


def _flat(values: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(values, dict):
        return {
            name: text
            for key, value in values.items()
            if key != "schema_version"
            for name, text in _flat(value, f"{prefix}.{key}" if prefix else key).items()
        }
    return {prefix: json.dumps(values) if isinstance(values, list) else str(values)}


def summarise(run: Run, results: Results, outcome: Outcome, report: Path) -> dict[str, Any]:
    """The run as JSON data: what `visionloop train --json` prints."""
    verdict = results.verdict.record
    return {
        "run": run.id,
        "model": run.config.model,
        "version": None if isinstance(outcome, Rejection) else outcome.version,
        "outcome": type(outcome).__name__.lower(),
        "undecided": list(outcome.gates) if isinstance(outcome, Undecided) else [],
        "candidate_digest": outcome.candidate_digest,
        "verdict": verdict.status,
        "reasons": list(verdict.reasons),
        "findings": [
            {"engine": engine.engine, "engine_status": engine.status, **finding.model_dump(exclude={"schema_version"})}
            for engine in verdict.engines
            for finding in engine.findings
        ],
        "engines": {
            evaluation.record.engine: {
                "status": evaluation.record.status,
                "reason": evaluation.record.reason,
                "metrics": estimates_json(evaluation.record),
                "latency_ms": {
                    "p50": measurement.record.latency_p50_ms,
                    "p90": measurement.record.latency_p90_ms,
                    "p99": measurement.record.latency_p99_ms,
                    "n": measurement.record.num_runs,
                    "noisy": measurement.record.noisy,
                },
                "size_bytes": measurement.record.size_bytes,
                "memory_mb": measurement.record.memory_mb,
                **costs_json(measurement.record, run.config.export.hourly_price),
            }
            for evaluation, measurement in zip(results.evaluations, results.measurements, strict=True)
        },
        "serving_engine": verdict.serving_engine,
        **headline_json(run),
        "corrupted": corrupted_json(run, results),
        "folds": folds_json(run, results),
        "folds_proposed": folds_proposed(run, results),
        "evidence": evidence_json(results.shown.record) if results.shown else None,
        **({"optimisation": passes} if (passes := passes_json(results)) else {}),
        "data": {
            "version": run.data.dvc_hash,
            "kept": results.dataset.record.num_kept,
            "quarantined": results.dataset.record.num_quarantined,
            "splits": dict(results.splits.record.counts),
            "warnings": results.warnings,
            "issues": results.dataset.record.severities,
            "looked_for": {found.name: found.num_issues for found in results.dataset.record.findings if found.ran},
            "not_looked_for": {found.name: found.reason for found in results.dataset.record.findings if not found.ran},
        },
        "git_commit": run.lineage.git_commit,
        "computed_on": results.checkpoint.record.computed_on,
        "seconds": {
            name: {"seconds": round(seconds, 2), "cached": cached}
            for name, (seconds, cached) in run.console.durations.items()
        },
        "report": str(report),
        "run_folder": str(run.folder),
    }


def write_report(run: Run, results: Results, outcome: Outcome) -> Path:
    """`report.html` of the run, with what registration answered; left alone when it says just that already."""
    path = run.folder / "report.html"
    told, judged_before = notes_of(run, results), holdout_told(run, results)
    drawn = (results.shown, *results.corrupted, results.champion_corrupted, results.passes_cost)
    evidence = [stored.record.digest() for stored in drawn if stored is not None]
    shown = [
        outcome.digest(),
        *told,
        judged_before,
        *evidence,
        results.verdict.record.digest(),
        *(m.record.digest() for m in results.measurements),
    ]
    mark = f"<!-- {sha256_text(canonical_json([*shown, report_source()]))} -->\n"
    if not path.exists() or not path.read_text().endswith(mark):
        from flows.training.report import render

        write_atomically(path, (render(run, results, outcome, told, judged_before) + mark).encode())
    return path


def report_source() -> str:
    """Digest of what draws the report: a changed template draws it anew."""
    from components import selective as curves
    from flows.pages import figures
    from flows.training import candidate_evidence, diagnosis, engine_table, passes_told, report, selective

    modules = (candidate_evidence, diagnosis, engine_table, passes_told, report, figures, selective, curves)
    drawn_by = [Path(str(module.__file__)) for module in modules]
    templates = [figures.TEMPLATES / name for name in ("report.html", "style.html")]
    return sha256_text("".join(sha256_file(path) for path in (*drawn_by, *templates)))
