"""No regression: not worse than the champion on the same images, compared pair by pair.

The interval of the paired difference of two shares is Newcombe's (1998, method 10), which stays valid when few or no
answers differ. Negative flips (images the champion got right and the candidate gets wrong) have a budget of their own:
users feel them even when the mean improves (Yan et al., "Positive-Congruent Training", 2021). Their share is decided by its
exact interval: it is small, and there Wilson's fails a model on the budget in more than 2.5 % (`make bench NAME=gates`). So
both questions have three answers: one that fails decides, and a pass needs both.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from components.contracts.families import Evidence, Least
from components.contracts.verdicts import Finding, compare_budget, enough, fewest, too_few
from components.intervals import Counts, exact, paired_counts, paired_interval

Status = Literal["pass", "fail", "inconclusive"]


class Gate(BaseModel):
    """Pass when the 95 % intervals of (candidate - champion) and of the flips lie above `-margin` and in their budget."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    margin: float = Field(default=0.02, gt=0, lt=1)
    max_negative_flips: float = Field(default=0.05, le=1)
    """Of all compared images. Where no answer differs 72 images prove the default, fewer than the margin takes (189); two
    trainings of one recipe that agree on 95 % of the images lose half of the rest, which 5 % leaves room for."""

    @field_validator("max_negative_flips")
    @classmethod
    def _provable(cls, value: float) -> float:
        if not value > 0:
            raise ValueError("no number of test images proves that there are none; expected more than 0, such as 0.01")
        return value

    def judge(self, evidence: Evidence) -> Finding:
        if unknown := evidence.champion_unknown("no_regression"):
            return _inconclusive(unknown)
        if evidence.champion is None:
            return Finding(
                gate="no_regression",
                status="not applicable",
                message="no version was ever promoted, so there is no champion to compare with",
            )
        answers, champion = evidence.answers, evidence.champion
        if answers is None or len(answers.image_ids) == 0:
            return _inconclusive("there are no answers of this engine to compare")
        if answers.classes != champion.classes:
            answers = answers.among(champion.classes)
        among = _told_classes(evidence, len(champion.image_ids))
        if problem := answers.unlike(champion):
            return _inconclusive(problem + among)
        mine, theirs = answers.right, champion.right
        n, counts = len(mine), paired_counts(mine, theirs)
        low, high = paired_interval(*counts)
        difference, flips = float(mine.mean() - theirs.mean()), exact(counts[2], n)
        text = (
            f"accuracy {mine.mean():.4f}, the champion's {theirs.mean():.4f}: difference {difference:+.4f} "
            f"[{low:+.4f}, {high:+.4f}] (n={n}), margin {self.margin:g}; wrong where the champion was right "
            f"{flips.value:.2%} [{flips.low:.2%}, {flips.high:.2%}], budget {self.max_negative_flips:.2%}"
        )
        status = self._status(counts)
        if status == "inconclusive":
            what = "shared test images" if among else "test images"
            text += "; " + too_few(what, n, enough(lambda size: self._decides(counts, size), n))
        return Finding.model_validate(
            {
                "gate": "no_regression",
                "status": status,
                "message": text + among,
                "value": difference,
                "threshold": -self.margin,
                "n": n,
            }
        )

    def least(self) -> Least:
        return Least(images=fewest(lambda n: self._status((n, 0, 0, 0)) == "pass"), against_champion=True)

    def _status(self, counts: Counts) -> Status:
        low, high = paired_interval(*counts)
        flips = compare_budget(exact(counts[2], sum(counts)), self.max_negative_flips)
        if high < -self.margin or flips == "fail":
            return "fail"
        return "pass" if low >= -self.margin and flips == "pass" else "inconclusive"

    def _decides(self, counts: Counts, size: int) -> bool:
        """Whether `size` images that fall into the same four groups would decide."""
        n = sum(counts)
        both, only_mine, only_theirs, neither = (round(count * size / n) for count in counts)
        return self._status((both, only_mine, only_theirs, neither)) != "inconclusive"


def _told_classes(evidence: Evidence, n: int) -> str:
    """What was compared where the champion knows other classes, and which are new or gone; else nothing."""
    ours = evidence.engine.classes
    theirs = evidence.champion_classes or ours
    new = [name for name in ours if name not in theirs]
    gone = [name for name in theirs if name not in ours]
    if not (new or gone) or evidence.champion is None:
        return ""
    shared = evidence.champion.classes
    text = (
        f"; compared on the {n} test images of the {len(shared)} classes that both know ({', '.join(shared)}), among these"
    )
    if new:
        text += f"; new: {', '.join(new)}, judged by the floors alone"
    if gone:
        text += f"; no longer known: {', '.join(gone)}"
    return text + (
        "; a class renamed without `visionloop data rename-class` looks like one that is gone and one that is new"
        if new and gone
        else ""
    )


def _inconclusive(message: str) -> Finding:
    return Finding(gate="no_regression", status="inconclusive", message=message)
