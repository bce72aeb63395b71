"""The report: one self-contained HTML page with the pictures a person wants before approving a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from components.contracts.records import Stored
from components.contracts.verdicts import Evaluation, Outcome, Rejection, Undecided
from components.selective import RiskCoverage
from components.selective import rows as risk_coverage_rows
from components.tables import read_frame
from flows.pages.figures import (
    confusion_figure,
    curves_figure,
    engine_figure,
    environment,
    in_words,
    pareto_figure,
    prepare_figures,
    reliability_figure,
    risk_coverage_figure,
    splits_figure,
    thumbnail,
)
from flows.training.candidate_evidence import corruptions, embedded, page, variants
from flows.training.data_since import data_since
from flows.training.data_since import told as data_told
from flows.training.diagnosis import PhaseResult, fit_told, gain_told, imbalance, phase_results
from flows.training.engine_table import cell, engine_row, metric_names
from flows.training.model_card import VERDICTS
from flows.training.passes_told import page as passes_page
from flows.training.passes_told import passes_json
from flows.training.results import Results, costs_json, evaluation_shown, folds_proposed
from flows.training.run import Run
from flows.training.selective import aurc_told, curve_of, rule_told

_SHOWN = 12


def render(run: Run, results: Results, outcome: Outcome | None, notes: Sequence[str], judged_before: str) -> str:
    """HTML of the report; `outcome` is None in the copy that is registered, which cannot know its own version.

    `notes` are what the ledger says of earlier gate policies and of rejections of the same weights, `judged_before` of how
    often the test set was used.
    """
    shown = evaluation_shown(results)
    verdict = results.verdict.record
    version = "" if outcome is None or isinstance(outcome, Rejection) else outcome.version
    title = f"{VERDICTS[verdict.status]}, version {version}" if version else VERDICTS[verdict.status]
    undecided = outcome.gates if isinstance(outcome, Undecided) else ()
    new, gone = results.classes_changed
    metrics = metric_names([e.record for e in results.evaluations], run.task.headline)
    phases, counts = run.config.training.all_phases, results.splits.record.counts
    trained = phase_results(results.history, phases, run.task.headline, counts["valid"])
    curve, hourly_price = curve_of(run, results), run.config.export.hourly_price
    return (
        environment()
        .get_template("report.html")
        .render(
            model=run.config.model,
            outcome_title=title,
            version=version,
            undecided=undecided,
            registered=outcome is None,
            run_id=run.id,
            lineage=run.lineage,
            verdict=verdict,
            notes=notes,
            folds=results.folds.told(run.task.headline) if results.folds else folds_proposed(run, results),
            champion=results.current_champion.version if results.current_champion else "",
            classes_new=new,
            classes_gone=gone,
            metrics=[in_words(name) for name in metrics],
            engines=[
                engine_row(e.record, answered.record, m.record, metrics, costs_json(m.record, hourly_price))
                for e, answered, m in zip(results.engines, results.evaluations, results.measurements, strict=True)
            ],
            n_test=shown.record.num_images,
            judged_before=judged_before,
            machine=results.measurements[0].record.machine,
            hourly_price=hourly_price,
            checkpoint=results.checkpoint.record,
            phases=[
                {
                    "name": f"{result.number}. {result.part}",
                    "epochs": f"{result.first_epoch} to {result.last_epoch}",
                    "best_epoch": result.best_epoch,
                    "valid": cell(result.valid) if result.valid else ("", ""),
                    "train": cell(result.train) if result.train else ("", ""),
                    "gain": gain_told(result),
                }
                for result in trained
            ],
            fit_told=fit_told(trained, phases, run.task.headline),
            imbalance=imbalance(
                results.splits.record.class_counts["train"],
                shown.record.per_class,
                phases,
                one_class=getattr(run.task, "one_class", False),
            ),
            headline=in_words(run.task.headline),
            splits=results.splits.record,
            dataset=results.dataset.record,
            warnings=results.warnings,
            shown=shown.record.engine,
            per_class=[
                {
                    "name": m.name,
                    "num_train": results.splits.record.class_counts["train"].get(m.name, ""),
                    "support": m.support,
                    "cells": [cell(e) for e in (m.precision, m.recall, m.f1)],
                }
                for m in shown.record.per_class
            ],
            figures=_figures(run, results, shown, trained, curve),
            risk_coverage=risk_coverage_rows(curve) if curve else [],
            aurc=aurc_told(curve) if curve else "",
            rule=rule_told(results.release.record.decision) if results.release else [],
            evidence=page(results.shown.record, embedded(results.shown.folder)) if results.shown else None,
            corruptions=corruptions(
                [stored.record for stored in results.corrupted],
                results.champion_corrupted.record if results.champion_corrupted else None,
                _variants(run, results),
            ),
            passes=passes_page(passes_json(results), in_words(run.task.headline)),
            data_told=data_told(data_since(run, results), None),
            examples=_examples(run, results),
            quarantined=read_frame(results.dataset.folder / results.dataset.record.quarantine.name)
            .head(20)
            .to_dict("records"),
            provenance=_provenance(run, results),
        )
    )


def _figures(
    run: Run,
    results: Results,
    shown: Stored[Evaluation],
    trained: Sequence[PhaseResult],
    curve: RiskCoverage | None,
) -> dict[str, Markup]:
    prepare_figures()
    task = run.task
    drawn = [(each.part, each.last_epoch, each.best_epoch) for each in trained if not each.computed]
    own = {"confusion": confusion_figure, "reliability": reliability_figure}
    return {
        "engines": engine_figure(results.evaluations, task.headline),
        "pareto": pareto_figure(
            results.evaluations, results.measurements, task.headline, results.verdict.record.serving_engine
        ),
        **({"curves": curves_figure(results.history, task.headline, drawn)} if drawn else {}),
        "splits": splits_figure(results.splits.record),
        **{name: own[name](shown.record) for name in task.figures},
        **({"risk_coverage": risk_coverage_figure(curve)} if curve else {}),
    }


def _first_of_test(run: Run, results: Results) -> Path | None:
    table = read_frame(results.splits.folder / results.splits.record.table.name, ["path", "split"])
    paths = table.loc[table["split"] == "test", "path"]
    return run.workspace.data / paths.iloc[0] if len(paths) else None


def _variants(run: Run, results: Results) -> list[dict[str, str]]:
    example = _first_of_test(run, results)
    return variants(results.checkpoint.record.preprocessing, example) if example and results.corrupted else []


def _examples(run: Run, results: Results) -> list[dict[str, Any]]:
    table = read_frame(results.splits.folder / results.splits.record.table.name)
    chosen = table[table["split"] == "train"].groupby("label", sort=True).head(2).head(2 * _SHOWN)
    return [
        {"path": row["path"], "label": row["label"], "image": thumbnail(run.workspace.data / row["path"])}
        for row in chosen.to_dict("records")
    ]


def _provenance(run: Run, results: Results) -> list[tuple[str, str]]:
    lineage, checkpoint = run.lineage, results.checkpoint.record
    return [
        ("run", run.id),
        ("recipe", f"{lineage.recipe} (config {lineage.config_digest[:16]})"),
        *(("found by", origin.told) for origin in (run.config.tuned, run.config.chosen) if origin is not None),
        ("data version", lineage.data_version),
        ("test ledger", results.dataset.record.data.ledger_sha256),
        ("test split", results.splits.record.test_digest),
        ("trained from", run.weights_told),
        *([("teacher", run.taught_by)] if run.taught_by else []),
        *([("trained on", checkpoint.computed_on)] if checkpoint.computed_on else []),
        ("weights", checkpoint.weights.sha256),
        ("git commit", lineage.git_commit + (" with uncommitted changes" if lineage.git_dirty else "")),
        ("code", lineage.code_version),
        ("locked libraries", lineage.lock_digest),
        ("gate policy", results.verdict.record.policy_digest),
    ]
