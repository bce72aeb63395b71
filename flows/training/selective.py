"""When the engine that serves answers and when it is unsure, on the frozen test split: the curve, and the release's rule."""

from __future__ import annotations

import numpy as np

from components.answering import needed
from components.contracts.releases import DecisionRule
from components.contracts.verdicts import Estimate
from components.selective import RiskCoverage, risk_coverage
from components.tables import read_frame
from flows.training.results import Results, evaluation_shown
from flows.training.run import Run


def curve_of(run: Run, results: Results) -> RiskCoverage | None:
    """Of the serving engine, or of the reference where that could not run; None where it gave no answers to look at."""
    shown = evaluation_shown(results)
    if shown.record.predictions is None:
        return None
    frame = read_frame(shown.folder / shown.record.predictions.name, ["predicted", "confidence", "right"])
    confidence, right = frame["confidence"].to_numpy(dtype=np.float64), frame["right"].to_numpy(dtype=np.bool_)
    if results.release is None:
        return risk_coverage(shown.record.engine, confidence, right)
    rule = results.release.record.decision
    thresholds = {
        label: needed(run.task, label, rule.threshold, rule.class_thresholds) for label in frame["predicted"].unique()
    }
    answered = confidence >= frame["predicted"].map(thresholds).to_numpy(dtype=np.float64)
    threshold = None if rule.critical else rule.threshold
    return risk_coverage(shown.record.engine, confidence, right, answered=answered, threshold=threshold)


def rule_told(rule: DecisionRule) -> list[str]:
    """The release's rule and what it comes to on test, a sentence each."""
    accuracy = f", accuracy on them {_shown(rule.accuracy)}" if rule.accuracy is not None else ""
    return [
        f'Answers below confidence {rule.threshold:.4f} are "unsure": it answers {_shown(rule.coverage)} of the test '
        f"images{accuracy}",
        *(each.told() for each in rule.critical),
    ]


def aurc_told(curve: RiskCoverage) -> str:
    """The area under the curve, beside that of an order that says nothing."""
    blind = curve.points[0].risk
    assert blind is not None  # the first point answers everything
    return (
        f"Area under the curve (AURC) {curve.aurc.value:.5f} [{curve.aurc.low:.5f}, {curve.aurc.high:.5f}]; confidences "
        f"that say nothing would come to {blind.value:.5f}"
    )


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:.2%} [{estimate.low:.2%}, {estimate.high:.2%}] (n={estimate.n})"
