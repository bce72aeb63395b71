"""What the stages of a run found, and the digests that an approval is bound to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from components.choosing import images_a_second_a_core, price_of_a_million
from components.contracts.data import Dataset, Renames, Splits, names_after
from components.contracts.evidence import CandidateEvidence, PassesCost
from components.contracts.models import Checkpoint, Engine
from components.contracts.records import Stored, canonical_json, sha256_text
from components.contracts.releases import Release
from components.contracts.verdicts import (
    Estimate,
    Evaluation,
    FoldEstimate,
    Measurement,
    Robustness,
    SliceTable,
    Verdict,
)
from components.contracts.wording import counted
from components.gating import counting_test_images
from components.samples import rows
from components.tables import read_frame
from components.training import begins_from_a_model
from flows.training.run import Run
from registry.models import CHAMPION_CORRUPTED, CurrentChampion

_FOLDS = 5


@dataclass(frozen=True)
class Results:
    """Everything the stages found, in the order of the engines: the torch reference first."""

    dataset: Stored[Dataset]
    splits: Stored[Splits]
    checkpoint: Stored[Checkpoint]
    engines: Sequence[Stored[Engine]]
    evaluations: Sequence[Stored[Evaluation]]
    measurements: Sequence[Stored[Measurement]]
    current_champion: CurrentChampion | None
    """Today's champion, None where none was ever promoted."""
    champion: Stored[Evaluation] | None
    """What it answered on the test images of the classes that it shares with the data."""
    verdict: Stored[Verdict]
    release: Stored[Release] | None
    """Absent when the gates refused it; what they left undecided and a person may except is packaged."""
    slices: Stored[SliceTable] | None = None
    """Groups of the test images; None where the reference gave no answers."""
    shown: Stored[CandidateEvidence] | None = None
    """What a person looks at."""
    folds: FoldEstimate | None = None
    """What the recipe makes of all images, where it was asked for."""
    corrupted: Sequence[Stored[Robustness]] = ()
    """What engines answered on corrupted test images, one for all in fp32."""
    champion_corrupted: Stored[Robustness] | None = None
    passes_cost: Stored[PassesCost] | None = None
    """What passes cost on test; None where there were none, or where it was not asked."""

    @property
    def classes_changed(self) -> tuple[list[str], list[str]]:
        """Classes that the champion does not know, and classes of the champion that the candidate no longer knows."""
        ours = self.checkpoint.record.classes
        theirs = names_after(self.current_champion.engine.record.classes, self.renamed) if self.current_champion else ours
        return [name for name in ours if name not in theirs], [name for name in theirs if name not in ours]

    @property
    def renamed(self) -> Renames:
        """Classes that were renamed since the champion was trained."""
        return self.dataset.record.data.renames_since(self.current_champion.data) if self.current_champion else ()

    @property
    def data_notes(self) -> list[str]:
        """What changed in the data between the champion and this model and has to be known when the two are compared."""
        if self.current_champion is None:
            return []
        whose = f"the data of the champion (version {self.current_champion.version})"
        notes = [
            f"Class {old!r} of {whose} is called {new!r} now, and both are compared on it." for old, new in self.renamed
        ]
        was = self.current_champion.test_labels
        names = dict(zip(labels := sorted(set(was.values())), names_after(labels, self.renamed), strict=True))
        table = rows(self.splits, "test").drop_duplicates("picture")
        changed = [
            f"{path} ({names[was[picture]]}, now {label})"
            for path, picture, label in zip(table["path"], table["picture"], table["label"], strict=True)
            if picture in was and names[was[picture]] != label
        ]
        if changed:
            notes.append(
                f"{counted(len(changed), 'frozen test picture')} relabelled since {whose}, and both are judged by the new "
                f"label: {', '.join(changed[:5])}{', ...' if len(changed) > 5 else ''}."
            )
        return notes

    @property
    def warnings(self) -> list[str]:
        """What a person should know of the data before believing in the model."""
        contract = self.checkpoint.record.preprocessing
        sides = read_frame(self.dataset.folder / self.dataset.record.samples.name, ["short_side"])["short_side"]
        small = sides[sides < min(contract.height, contract.width)]
        if small.empty:
            return [*self.dataset.record.warnings, *self.splits.record.notes]
        told = (
            f"{len(small)} of {counted(len(sides), 'image')} are smaller than the {contract.width}x{contract.height} pixels "
            f"that the network sees, and are enlarged, {contract.resize_shortest / small.median():.1f} times in the middle"
        )
        return [*self.dataset.record.warnings, told, *self.splits.record.notes]

    @property
    def history(self) -> list[dict[str, float]]:
        """One row an epoch."""
        rows: list[dict[str, float]] = json.loads((self.checkpoint.folder / self.checkpoint.record.history.name).read_text())
        return rows


def shown_of(evaluations: Sequence[Stored[Evaluation]], serving_engine: str) -> Stored[Evaluation]:
    """The serving engine's evaluation, or the reference's where that engine could not run."""
    for evaluation in evaluations:
        if evaluation.record.engine == serving_engine and evaluation.record.metrics:
            return evaluation
    return evaluations[0]


def evaluation_shown(results: Results) -> Stored[Evaluation]:
    """The same of a run that is judged."""
    return shown_of(results.evaluations, results.verdict.record.serving_engine)


def bound_digests(results: Results) -> dict[str, Any]:
    """What an approval of this candidate is bound to: any change of one of these makes it another candidate."""
    return {
        "data": results.dataset.record.data.digest(),
        "split": results.splits.record.test_digest,
        "weights": results.checkpoint.record.weights.sha256,
        "engines": {stored.record.name: stored.record.digest() for stored in results.engines},
        "serving": results.verdict.record.serving_engine,
        "policy": results.verdict.record.policy_digest,
        "evidence": {stored.record.engine: stored.record.digest() for stored in results.evaluations},
        **({"slices": results.slices.record.digest()} if results.slices else {}),
        **({"shown": results.shown.record.digest()} if results.shown else {}),
        # Rows from before there was any are found again by what they were bound to.
        **({"corrupted": {s.record.engine: s.record.digest() for s in results.corrupted}} if results.corrupted else {}),
        **({CHAMPION_CORRUPTED: results.champion_corrupted.record.digest()} if results.champion_corrupted else {}),
        **({"unoptimised": results.passes_cost.record.before_digest} if results.passes_cost else {}),
        "verdict": results.verdict.record.status,
        "release": results.release.record.digest() if results.release else "none",
        "champion": results.champion.record.engine_digest if results.champion else "none",
    }


def candidate_digest(run: Run, results: Results) -> str:
    """Identity of a candidate: what it is made of, whom it was compared with and what each gate said.

    Measured milliseconds are in its evidence, not in its identity: a slower minute makes no new model, unless it turns the
    answer of a gate, or the choice of the engine that serves where the recipe leaves that to be chosen.
    """
    verdict = results.verdict.record
    findings = [[e.engine, f.gate, f.status] for e in verdict.engines for f in e.findings]
    return sha256_text(canonical_json([run.config.model, bound_digests(results), findings]))


def headline_json(run: Run) -> dict[str, str]:
    """The task's headline metric as summaries and the ledger hold it: without a word, it is the accuracy."""
    headline = run.task.headline
    return {} if headline == "accuracy" else {"headline": headline}


def estimate_json(estimate: Estimate) -> dict[str, float | int]:
    """An estimate as summaries and the ledger hold it."""
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n}


def costs_json(measured: Measurement, hourly_price: float | None) -> dict[str, float]:
    """Single images a second of each core, and what a million of them cost where the recipe says what an hour does."""
    p50, threads = measured.latency_p50_ms, measured.num_threads
    if p50 is None or not threads:
        return {}
    priced = {"price_of_a_million": price_of_a_million(p50, hourly_price)} if hourly_price is not None else {}
    return {"images_a_second_a_core": images_a_second_a_core(p50, threads), **priced}


def folds_proposed(run: Run, results: Results) -> str:
    """What to ask for where few test images left a gate undecided; empty where folds were there, or would tell nothing."""
    if results.folds is not None:
        return ""
    # Folds are answered without corruption, and a gate that corrupts images says itself how many more it could be shown.
    counting = counting_test_images(run.config.gating)
    undecided = {
        finding.gate
        for engine in results.verdict.record.engines
        if engine.serving or engine.required
        for finding in engine.findings
        if finding.status == "inconclusive" and finding.n and finding.gate in counting
    }
    if not undecided or begins_from_a_model(run.config.training, run.workspace.root):
        return ""
    num_test, num_kept = results.splits.record.counts["test"], results.dataset.record.num_kept
    return (
        f"{counted(num_test, 'test image')} did not decide {', '.join(sorted(undecided))}: --set evaluation.folds={_FOLDS} "
        f"adds an estimate of the recipe on all {num_kept} images by {_FOLDS} more trainings, which no gate reads"
    )


def folds_json(run: Run, results: Results) -> dict[str, Any] | None:
    """The estimate of the recipe as summaries and the ledger hold it; None where it was not asked for."""
    if results.folds is None:
        return None
    return {
        "told": results.folds.told(run.task.headline),
        "folds": results.folds.folds,
        "metrics": {name: estimate_json(estimate) for name, estimate in results.folds.metrics.items()},
    }


def estimates_json(evaluation: Evaluation) -> dict[str, Any]:
    return {name: estimate_json(estimate) for name, estimate in evaluation.metrics.items()}
