"""How often the gates err: simulated models, whose true figures are known, through the gates' own `judge`.

A gate that decides by a 95 % interval says by that: of models that lie on its limit at most 2.5 % pass, and at most 2.5 %
fail. Each share is held against that by a one-sided binomial test. Beside it stands what a gate would say that looks at the
measured value alone, of the same models. Then the power: how often a successor that is truly better or worse by so much
passes, fails and stays undecided, by `no_regression` as it comes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench._evidence import CLASSES, Simulated, evidence_of
from components import plugins
from components.contracts.families import Evidence, Gate
from components.intervals import wilson
from components.tasks.classification import Task

NUM_MODELS = 2000
"""Models, or pairs of candidate and champion, for each share."""
SIZES = (500, 2_000, 10_000)
"""Test images."""
AGREEMENTS = (0.98, 0.95)
"""Shares of the images on which candidate and champion agree."""
SHORT = {"NUM_MODELS": 20, "SIZES": (500,)}
STATED = 0.025
_ACCURACY = 0.95
"""The champion's."""
_MARGIN, _FLIPS = 0.02, 0.03
_DIFFERENCES = (-0.02, -0.01, -0.005, 0.0, 0.005, 0.01, 0.02)
_FLOORS = {"accuracy": (0.85, 0.96), "class_recall": (0.70, 0.80)}
"""Those of the shipped recipes."""
_ALPHA = 0.01
"""Shared by all tests: so often one of them is lost by chance where every gate holds what it says."""
_SEED = 20240717
Says = Literal["pass", "fail"]


@dataclass(frozen=True)
class Share:
    """How often a gate says of models what is not so, or is so on the limit alone."""

    gate: str
    truth: str
    says: Says
    num_images: int
    agreement: float | None
    share: float
    by_value: float
    """Where the measured value decides."""
    p_value: float

    @property
    def name(self) -> str:
        agreeing = f", agreement {self.agreement:g}" if self.agreement is not None else ""
        return f"{self.gate}, {self.truth}: {self.says}, n = {self.num_images:,}{agreeing}"


def run(_data: Path | None, _scratch: Path) -> dict[str, Any]:
    """The largest share of false answers; the ratio is that of a gate that decides by the value. Needs no data."""
    found = []
    for n in SIZES:
        print(f"n = {n} ...", file=sys.stderr)
        for agreement in AGREEMENTS:
            found += paired_shares(n, agreement, NUM_MODELS)
        for gate, floors in _FLOORS.items():
            for floor in floors:
                found += floor_shares(gate, floor, n, NUM_MODELS)
    powers = [power(n, a, d, NUM_MODELS) for n in SIZES for a in AGREEMENTS for d in _DIFFERENCES]
    worst, by_value = max(each.share for each in found), max(each.by_value for each in found)
    for line in _table(found, powers):
        print(line, file=sys.stderr)
    return {
        "ours": round(worst, 4),
        "peers": {"by the measured value": round(by_value, 4)},
        "ratio": round(by_value / worst, 1) if worst else None,
        "n": NUM_MODELS,
        "unit": f"largest share of false answers among {len(found)}; at most {STATED} is what the intervals say",
        "shares": {
            each.name: {"share": each.share, "by_value": each.by_value, "p": round(each.p_value, 4)} for each in found
        },
        "power": powers,
        "failures": [each.name for each in found if each.p_value < _ALPHA / len(found)],
    }


def paired_shares(n: int, agreement: float, num: int) -> list[Share]:
    """False answers of `no_regression`, its two questions each by itself, and on the limit of that question."""
    margin = plugins.load("gates", "no_regression", {"margin": _MARGIN, "max_negative_flips": 1})
    flips = plugins.load("gates", "no_regression", {"margin": 0.5, "max_negative_flips": _FLIPS})
    same, worse = ([*pairs(n, agreement, difference, num)] for difference in (0.0, -_MARGIN))
    # As many images as lie on the budget are lost, and as many won as agree with the agreement that is asked for.
    wide = min(agreement, 1 - _FLIPS)
    on_budget = [*pairs(n, wide, 1 - wide - 2 * _FLIPS, num)]

    def below(evidence: Evidence) -> Says:
        return "fail" if _difference(evidence) < -_MARGIN else "pass"

    def over(evidence: Evidence) -> Says:
        return "fail" if _flips(evidence) > _FLIPS else "pass"

    return [
        _share("no_regression", margin, "no true difference", "fail", same, below, n, agreement),
        _share("no_regression", margin, "worse by the margin", "pass", worse, below, n, agreement),
        _share("no_regression", margin, "worse by the margin", "fail", worse, below, n, agreement),
        _share("no_regression", flips, "flips at the budget", "pass", on_budget, over, n, wide),
        _share("no_regression", flips, "flips at the budget", "fail", on_budget, over, n, wide),
    ]


def floor_shares(gate: str, floor: float, n: int, num: int) -> list[Share]:
    """False answers about models that lie on a floor; of a class, where that one is as good and the other without fault."""
    models = [*(_accurate(n, floor, num) if gate == "accuracy" else _recalling(n, floor, num))]
    asked: Gate = plugins.load("gates", gate, {"floor": floor})

    def below(evidence: Evidence) -> Says:
        of_classes = [each.recall.value for each in evidence.evaluation.per_class]
        return "fail" if min([*of_classes, *(e.value for e in evidence.evaluation.metrics.values())]) < floor else "pass"

    truth = f"at the floor of {floor:g}"
    answers: tuple[Says, Says] = ("pass", "fail")
    return [_share(gate, asked, truth, says, models, below, n, None) for says in answers]


def power(n: int, agreement: float, difference: float, num: int) -> dict[str, Any]:
    """Shares of the answers of `no_regression`, with its defaults, about a true difference."""
    said = _said(plugins.load("gates", "no_regression", {}), pairs(n, agreement, difference, num))
    return {
        "n": n,
        "agreement": agreement,
        "difference": difference,
        **{status: said[status] / num for status in ("pass", "fail", "inconclusive")},
    }


def pairs(n: int, agreement: float, difference: float, num: int) -> Iterator[Evidence]:
    """Candidates and champions whose true accuracies differ by `difference`, and whose answers agree so often."""
    won, lost = (1 - agreement + difference) / 2, (1 - agreement - difference) / 2
    assert min(won, lost) > -1e-12, f"a difference of {difference} takes an agreement of less than {agreement}"
    both = _ACCURACY - lost
    shares = np.clip([both, won, lost, 1 - both - won - lost], 0, 1)
    answers = Simulated(n)
    for counts in _rng(n, agreement, difference).multinomial(n, shares / shares.sum(), size=num):
        group = np.repeat(np.arange(4), counts)
        yield evidence_of(answers.of(group < 2), champion=answers.of((group == 0) | (group == 2)))


def _accurate(n: int, accuracy: float, num: int) -> Iterator[Evidence]:
    for hits in _rng(n, accuracy).binomial(n, accuracy, size=num):
        yield evidence_of(None, metrics={"accuracy": wilson(int(hits), n)})


def _recalling(n: int, recall: float, num: int) -> Iterator[Evidence]:
    answers, task = Simulated(n), Task()
    targets = task.targets(answers.labels, CLASSES)
    first = np.flatnonzero(targets == 0)
    for hits in _rng(n, recall).binomial(len(first), recall, size=num):
        right = np.ones(n, dtype=np.bool_)
        right[first[hits:]] = False
        given = answers.of(right)
        yield evidence_of(given, per_class=task.per_class(given.logits, targets, CLASSES))


def _share(
    gate: str,
    asked: Gate,
    truth: str,
    says: Says,
    models: list[Evidence],
    by_value: Callable[[Evidence], Says],
    n: int,
    agreement: float | None,
) -> Share:
    from scipy.stats import binomtest

    count = _said(asked, models)[says]
    return Share(
        gate=gate,
        truth=truth,
        says=says,
        num_images=n,
        agreement=agreement,
        share=count / len(models),
        by_value=sum(by_value(model) == says for model in models) / len(models),
        p_value=float(binomtest(count, len(models), STATED, alternative="greater").pvalue),
    )


def _said(gate: Gate, models: Iterable[Evidence]) -> Counter[str]:
    return Counter(gate.judge(model).status for model in models)


def _difference(evidence: Evidence) -> float:
    assert evidence.answers is not None
    assert evidence.champion is not None
    return float(evidence.answers.right.mean() - evidence.champion.right.mean())


def _flips(evidence: Evidence) -> float:
    assert evidence.answers is not None
    assert evidence.champion is not None
    return float((evidence.champion.right & ~evidence.answers.right).mean())


def _rng(*values: float) -> np.random.Generator:
    """Draws of their own for each setting, the same at every run."""
    return np.random.default_rng([_SEED, *(round(1e6 * (value + 1)) for value in values)])


def _table(found: Iterable[Share], powers: Iterable[dict[str, Any]]) -> Iterator[str]:
    for each in found:
        yield f"{each.name:76} {each.share:7.2%}  by value {each.by_value:7.2%}  p {each.p_value:.3f}"
    for row in powers:
        shares = "  ".join(f"{status} {row[status]:6.1%}" for status in ("pass", "fail", "inconclusive"))
        yield f"difference {row['difference']:+.3f}, n = {row['n']:,}, agreement {row['agreement']:g}:  {shares}"
