"""What passes cost and bought: the network as it was trained beside what they made of it, as engines of one kind."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from components.answer_tables import answers_of
from components.contracts.data import Splits
from components.contracts.evidence import ClassCost, Flips, PassesCost
from components.contracts.families import Answers, Task
from components.contracts.models import Engine
from components.contracts.progress import Progress, silent
from components.contracts.records import Stored
from components.contracts.verdicts import Estimate, Evaluation, Measurement
from components.evaluation import EvaluationConfig, measure
from components.intervals import Right, paired_counts, paired_difference
from components.slices import holm, p_worse


def compare(
    before: tuple[Stored[Engine], Stored[Evaluation]],
    after: tuple[Stored[Engine], Stored[Evaluation]],
    splits: Stored[Splits],
    data: Path,
    task: Task,
    config: EvaluationConfig,
    *,
    progress: Progress = silent,
) -> PassesCost:
    """Compare the answers image by image, and time both engines in turns; it decides nothing."""
    notes: list[str] = []
    answers, by_class = _answers(before, after, task, notes)
    measured = measure([before[0], after[0]], splits, data, config, progress=progress)
    notes += [f"{each.engine} was not timed: {each.reason}" for each in measured if each.status != "measured"]
    return PassesCost(
        engine=after[0].record.name,
        engine_digest=after[0].record.digest(),
        before_digest=before[0].record.digest(),
        test_digest=after[1].record.test_digest,
        answers=answers,
        by_class=by_class,
        p50_before_ms=measured[0].latency_p50_ms,
        p50_after_ms=measured[1].latency_p50_ms,
        speedup=_speedup(*measured),
        machine=measured[1].machine,
        engine_bytes_before=before[0].record.size_bytes,
        engine_bytes_after=after[0].record.size_bytes,
        notes=tuple(notes),
    )


def _answers(
    before: tuple[Stored[Engine], Stored[Evaluation]],
    after: tuple[Stored[Engine], Stored[Evaluation]],
    task: Task,
    notes: list[str],
) -> tuple[Flips | None, tuple[ClassCost, ...]]:
    asked: list[Answers] = []
    for what, (engine, evaluation) in (("before the passes", before), ("after them", after)):
        found = answers_of(evaluation, engine.record.classes, task)
        if found is None or evaluation.record.reason:
            notes.append(f"nothing is known of its answers {what}: {evaluation.record.reason or evaluation.record.status}")
        else:
            asked.append(found)
    if len(asked) < 2:
        return None, ()
    theirs, ours = asked
    if problem := ours.unlike(theirs):
        notes.append(f"the answers before and after cannot be compared: {problem}")
        return None, ()
    both, won, lost, neither = paired_counts(ours.right, theirs.right)
    difference = paired_difference(ours.right, theirs.right)
    flips = Flips(both=both, won=won, lost=lost, neither=neither, difference=difference)
    return flips, cost_by_class(ours.right, theirs.right, ours.labels)


def cost_by_class(right: Right, was: Right, labels: Sequence[str]) -> tuple[ClassCost, ...]:
    """What right answers after the passes and before cost each class; the one that lost most first."""
    of_label = np.array(labels, dtype=object)
    inside = {name: of_label == name for name in sorted(set(labels))}
    corrected = holm([p_worse(right[chosen], was[chosen], margin=0.0) for chosen in inside.values()])
    costs = [
        ClassCost(
            name=name,
            before=float(was[chosen].mean()),
            after=float(right[chosen].mean()),
            difference=paired_difference(right[chosen], was[chosen]),
            p_worse=p,
        )
        for (name, chosen), p in zip(inside.items(), corrected, strict=True)
    ]
    return tuple(sorted(costs, key=lambda cost: cost.difference.value))


def _speedup(before: Measurement, after: Measurement) -> Estimate | None:
    """By the rounds, of which each met the same moment of the machine."""
    rounds = [was / now for was, now in zip(before.rounds_p50_ms, after.rounds_p50_ms, strict=False) if now > 0]
    if not rounds:
        return None
    return Estimate(
        value=statistics.median(rounds), low=min(rounds), high=max(rounds), n=len(rounds), method="range of the rounds"
    )
