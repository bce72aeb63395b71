"""Whether `no_regression` judges trained models right: one that is better, one that is worse, and one on too few images.

With each seed `good` is trained by the whole recipe, and `poor` is a head alone on a tenth of the pictures, of which a share
has wrong labels; `good` of the next seed is the whole recipe `again`. All of them answer the test images that the gate sees,
and others that no gate sees: by their intervals these establish what is true of a pair, for both of the gate's questions. A
pair of which they establish nothing is told and not counted. `again` is judged on small groups of the test images, too, on
which no candidate can pass: there the gate is right that is undecided and says how many would decide, and so many are tried
where they are there. Beside it stands what decides by the measured value alone. It is right where it says what is true, on
however few images.

DATA is a folder of class folders, or of train/ and test/ with class folders in them; without it the pictures are noise of
two kinds, and the figures mean nothing.
"""

from __future__ import annotations

import re
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from bench._evidence import evidence_of
from bench._trainings import NUM_THREADS, Part, config_of, head_and_blocks, logits, parts_of, recipe_for
from bench.serving import say
from components.contracts.families import Answers
from components.contracts.verdicts import Estimate, Finding, compare, compare_budget, compare_interval
from components.gates.no_regression import Gate
from components.intervals import exact, paired_counts, paired_difference
from components.tasks.classification import Task

TRAINED, JUDGED, TRUTH = 200, 200, 400
"""Pictures of a class at most: those that train, those that the gate sees and those that it does not."""
FEW = 60
"""Test images of a small group."""
SEEDS = 6
EPOCHS = 60
"""Of a phase at most."""
SHORT = {"TRAINED": 20, "JUDGED": 20, "TRUTH": 20, "FEW": 10, "SEEDS": 2, "EPOCHS": 1}
_TENTH, _WRONG = 0.1, 0.4
"""Of the pictures, those that `poor` trains on; of these, the ones that have the label of another class."""
_PAIRS = {"better": ("poor", "good"), "worse": ("good", "poor"), "same recipe": ("good", "again")}
"""Champion and candidate."""
_WOULD_DECIDE = re.compile(r"about (\d+) would do|no number of them would")
Says = Literal["pass", "fail", "inconclusive"]
Places = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Model:
    """What a model answers on the images that the gate sees, and on those that it does not."""

    judged: Answers
    truth: Answers


@dataclass(frozen=True)
class Truth:
    """What images that no gate saw establish of a candidate and its champion."""

    difference: Estimate
    flips: Estimate
    says: Says
    """By both of the gate's questions; inconclusive where the images establish nothing."""

    def __str__(self) -> str:
        difference, flips = self.difference, self.flips
        return (
            f"difference {difference.value:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}], "
            f"flips {flips.value:.4f} [{flips.low:.4f}, {flips.high:.4f}] (n={flips.n})"
        )


@dataclass(frozen=True)
class Judgements:
    """What is said of one pair on one or more groups of test images of one size."""

    pair: str
    seed: int
    truth: Truth
    findings: tuple[Finding, ...]
    by_value: tuple[Says, ...]
    would_decide: tuple[int, ...]
    """As many images as an undecided finding says would do, of each that says it."""
    tried: tuple[Says, ...]
    """What the gate says on so many, where there are so many."""

    @property
    def counted(self) -> bool:
        return self.truth.says != "inconclusive"

    @property
    def right(self) -> list[bool]:
        return [each.status == self.truth.says or _rightly_undecided(each) for each in self.findings]

    @property
    def right_by_value(self) -> list[bool]:
        return [each == self.truth.says for each in self.by_value]

    def num_false(self, said: Sequence[str]) -> int:
        """How many pass what is worse or fail what is not."""
        return sum({each, self.truth.says} == {"pass", "fail"} for each in said)

    def facts(self) -> dict[str, Any]:
        said = [each.status for each in self.findings]
        return {
            "pair": self.pair,
            "seed": self.seed,
            "truth": str(self.truth),
            "true": self.truth.says,
            "n": self.findings[0].n,
            "groups": len(said),
            "gate": dict(Counter(said)),
            "right": sum(self.right) if self.counted else None,
            "false": self.num_false(said) if self.counted else None,
            "value": dict(Counter(self.by_value)),
            "right_by_value": sum(self.right_by_value) if self.counted else None,
            "false_by_value": self.num_false(self.by_value) if self.counted else None,
            "would_decide": statistics.median(self.would_decide) if self.would_decide else None,
            "tried": dict(Counter(self.tried)),
            "message": self.findings[0].message,
        }


def run(data: Path | None, scratch: Path) -> dict[str, Any]:
    """Share of judgements that are right, each pair, seed and size weighing the same; the ratio is to the value alone."""
    torch.set_num_threads(NUM_THREADS)
    tested = {"judged": JUDGED, "truth": TRUTH}
    parts, classes = parts_of(data, scratch, trained=TRAINED, tested=tested, kept=lambda num: max(num // 2, num - TRAINED))
    recipe = recipe_for(parts["train"].paths)
    sizes = {name: len(part.labels) for name, part in parts.items()}
    say(f"{sizes} pictures of {len(classes)} classes, recipe {recipe}")
    if sizes["judged"] < FEW:
        raise SystemExit(f"there are {sizes['judged']} test images to judge by; expected {FEW} or more")
    models: dict[str, list[Model]] = {"good": [], "poor": []}
    for seed in range(SEEDS):
        for name, of_seeds in models.items():
            start = time.perf_counter()
            of_seeds.append(_trained(name, seed, recipe, parts, classes, scratch))
            say(f"  {name}, seed {seed}: {of_seeds[-1].truth.right.mean():.4f}, {time.perf_counter() - start:.0f} s")
    models["again"] = [*models["good"][1:], models["good"][0]]
    rows: list[Judgements] = []
    for pair, (champion, candidate) in _PAIRS.items():
        for size in (None, FEW) if candidate == "again" else (None,):
            rows += [
                judgements(pair, seed, *both, size)
                for seed, both in enumerate(zip(models[candidate], models[champion], strict=True))
            ]
    for line in _table(rows):
        say(line)
    counted = [row for row in rows if row.counted]
    ours = _mean([row.right for row in counted])
    by_value = _mean([row.right_by_value for row in counted])
    return {
        "ours": ours,
        "peers": {"by the measured value": by_value},
        "ratio": round(ours / by_value, 4) if ours and by_value else None,
        "n": len(counted),
        "unit": "share judged right, mean of pairs, seeds and sizes of which the truth is established",
        "not_counted": len(rows) - len(counted),
        "false": sum(row.num_false([each.status for each in row.findings]) for row in counted),
        "false_by_value": sum(row.num_false(row.by_value) for row in counted),
        "judgements": sum(len(row.findings) for row in counted),
        "tried": dict(Counter(status for row in rows for status in row.tried)),
        "rows": [row.facts() for row in rows],
        "accuracies": {
            name: [round(float(model.truth.right.mean()), 4) for model in models[name]] for name in ("good", "poor")
        },
        "pictures": sizes,
        "recipe": recipe,
        "data": str(data) if data else "synthetic",
    }


def judgements(pair: str, seed: int, candidate: Model, champion: Model, size: int | None = None) -> Judgements:
    """The pair on all test images, or on as many groups of `size` as there are without an image in two of them."""
    mixed = np.random.default_rng(seed).permutation(len(candidate.judged.labels))
    size = size or len(mixed)
    findings, by_value, would_decide, tried = [], [], [], []
    for start in range(0, len(mixed) - size + 1, size):
        # An image of another group comes only after those of this one.
        order = np.roll(mixed, -start)
        finding = _finding(candidate.judged, champion.judged, order[:size])
        findings.append(finding)
        by_value.append(_by_value(candidate.judged, champion.judged, order[:size]))
        found = _WOULD_DECIDE.search(finding.message) if finding.status == "inconclusive" else None
        if found is not None and found[1]:
            would_decide.append(int(found[1]))
            if would_decide[-1] <= len(order):
                tried.append(_status(_finding(candidate.judged, champion.judged, order[: would_decide[-1]])))
    return Judgements(
        pair=pair,
        seed=seed,
        truth=truth_of(candidate.truth, champion.truth),
        findings=tuple(findings),
        by_value=tuple(by_value),
        would_decide=tuple(would_decide),
        tried=tuple(tried),
    )


def truth_of(candidate: Answers, champion: Answers) -> Truth:
    """What these answers establish of the gate's two questions, by their intervals."""
    mine, theirs, gate = candidate.right, champion.right, Gate()
    difference, flips = paired_difference(mine, theirs), exact(paired_counts(mine, theirs)[2], len(mine))
    return Truth(
        difference,
        flips,
        _both(compare_interval(difference, -gate.margin), compare_budget(flips, gate.max_negative_flips)),
    )


def _both(difference: Says, flips: Says) -> Says:
    if "fail" in (difference, flips):
        return "fail"
    return "pass" if difference == flips == "pass" else "inconclusive"


def _finding(candidate: Answers, champion: Answers, places: Places) -> Finding:
    return Gate().judge(evidence_of(_some(candidate, places), champion=_some(champion, places)))


def _by_value(candidate: Answers, champion: Answers, places: Places) -> Says:
    """What the measured value alone says of both questions."""
    mine, theirs, gate = candidate.right[places], champion.right[places], Gate()
    difference, flips = paired_difference(mine, theirs).value, float((theirs & ~mine).mean())
    return _both(compare(difference, -gate.margin, at_least=True), compare(flips, gate.max_negative_flips, at_least=False))


def _some(answers: Answers, places: Places) -> Answers:
    return replace(
        answers,
        image_ids=tuple(answers.image_ids[place] for place in places),
        labels=tuple(answers.labels[place] for place in places),
        logits=answers.logits[places],
    )


def _rightly_undecided(finding: Finding) -> bool:
    """Whether so few images can pass nothing, and the finding says what would decide."""
    least = Gate().least().images or 0
    few = finding.n is not None and finding.n < least
    return few and finding.status == "inconclusive" and _WOULD_DECIDE.search(finding.message) is not None


def _trained(name: str, seed: int, recipe: str, parts: Mapping[str, Part], classes: tuple[str, ...], scratch: Path) -> Model:
    head, blocks = head_and_blocks(recipe)
    train, valid = parts["train"], parts["valid"]
    phases = [head, blocks]
    if name == "poor":
        rng = np.random.default_rng(seed)
        phases = [head]
        train, valid = (_mislabelled(part, len(classes), rng) for part in (_tenth(train, rng), valid))
    asked = [parts["judged"], parts["truth"]]
    found = logits(
        config_of(recipe, phases, seed=seed, epochs=EPOCHS),
        train,
        valid,
        asked,
        len(classes),
        cache=scratch / "cache",
        out=scratch / f"{seed} {name}",
    )
    return Model(
        *(
            Answers(tuple(part.pictures), tuple(classes[label] for label in part.labels), answered, classes, Task())
            for part, answered in zip(asked, found, strict=True)
        )
    )


def _tenth(part: Part, rng: np.random.Generator) -> Part:
    """A tenth of each class, or two pictures of it."""
    labels = np.array(part.labels)
    chosen: list[int] = []
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        chosen += rng.permutation(of_class)[: max(2, round(_TENTH * len(of_class)))].tolist()
    return Part(
        [part.pictures[place] for place in chosen],
        [part.paths[place] for place in chosen],
        labels[chosen].tolist(),
    )


def _mislabelled(part: Part, num_classes: int, rng: np.random.Generator) -> Part:
    labels = np.array(part.labels)
    wrong = rng.choice(len(labels), round(_WRONG * len(labels)), replace=False)
    labels[wrong] = (labels[wrong] + rng.integers(1, num_classes, len(wrong))) % num_classes
    return replace(part, labels=labels.tolist())


def _mean(right: Sequence[Sequence[bool]]) -> float | None:
    """Each pair and size weighs the same; None where there is none."""
    return round(statistics.mean(map(statistics.mean, right)), 4) if right else None


def _table(rows: Sequence[Judgements]) -> Iterator[str]:
    for row in rows:
        facts = row.facts()
        groups = f" in each of {facts['groups']} groups" if facts["groups"] > 1 else ""
        yield f"{row.pair}, seed {row.seed}: truth {row.truth}: {_named(row.truth.says)}"
        yield f"    gate, {facts['n']} images{groups}: {_counts(facts['gate'])}; value: {_counts(facts['value'])}"
        if row.counted:
            yield (
                f"    right {facts['right']}, false {facts['false']} of {facts['groups']}; "
                f"by value right {facts['right_by_value']}, false {facts['false_by_value']}"
            )
        else:
            yield "    not counted"
        if row.tried:
            yield f"    where as many as it said would do were there: {_counts(facts['tried'])}"
        yield f"    {'the first: ' if groups else ''}{facts['message']}"


def _named(says: Says) -> str:
    return "not established" if says == "inconclusive" else says


def _counts(statuses: Mapping[str, int]) -> str:
    return ", ".join(f"{status} {count}" for status, count in statuses.items())


def _status(finding: Finding) -> Says:
    assert finding.status in ("pass", "fail", "inconclusive"), finding
    return finding.status
