"""Slices: nowhere shown to be worse than the champion, and in no slice below a floor.

A mean can rise while one camera, the night or a rare kind of picture gets worse. With many small slices one looks worse by
chance: what fails is worse by more than the margin after Holm's correction for all of them. A pass says that nothing was
shown; how much a slice could hide is in the message. What no slice may fall below is a `floor`, which is decided three ways.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from components.contracts.families import Answers, Evidence
from components.contracts.verdicts import (
    Finding,
    FindingStatus,
    SliceFigure,
    compare_interval,
    enough,
    too_few,
)
from components.contracts.wording import counted
from components.intervals import wilson
from components.slices import MIN_IMAGES, SHOWN_AT, holm, p_under, p_worse, slice_figures


class Gate(BaseModel):
    """Fails where a slice is shown to be worse than the champion by more than the margin, or below the floor."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    margin: float = Field(default=0.05, gt=0, lt=1)
    """How much worse than the champion a slice may be."""
    floor: float | None = Field(default=None, gt=0, lt=1)
    """The share of right answers that every slice has to reach with all of its 95 % interval; None for none."""
    min_images: int = Field(default=MIN_IMAGES, ge=5)
    """A slice of fewer images is not judged."""
    kinds: tuple[str, ...] = ()
    """Kinds of slices that there have to be, such as `source`: without one of them nothing is decided."""

    def judge(self, evidence: Evidence) -> Finding:
        answers, champion, slices = evidence.answers, evidence.champion, evidence.slices
        if slices is None:
            return _undecided("no slices were made of the test images")
        if missing := [kind for kind in self.kinds if kind not in slices.names]:
            why = next((f" ({note})" for note in slices.notes if note.startswith(f"{missing[0]}: ")), "")
            return _undecided(f"there are no slices by {missing[0]!r}{why}; there are: {', '.join(slices.names)}")
        if unknown := evidence.champion_unknown("slices"):
            return _undecided(unknown)
        if champion is None and self.floor is None:
            return Finding(
                gate="slices",
                status="not applicable",
                message="no version was ever promoted, so there is no champion to compare with, and no floor is set",
            )
        if answers is None or len(answers.image_ids) == 0:
            return _undecided("there are no answers of this engine to judge")
        if champion is not None and answers.classes != champion.classes:
            answers = answers.among(champion.classes)
        if problem := answers.unlike(champion or answers):
            return _undecided(problem)
        if not slices.knows(answers.image_ids):
            return _undecided("the slices are of other test images")
        theirs = champion.right if champion is not None else None
        figures = slice_figures(answers.right, theirs, answers.image_ids, slices, min_images=self.min_images)
        if not figures:
            n = len(answers.image_ids)
            return _undecided(
                f"none of the slices of {counted(n, 'test image')} has the {self.min_images} that it takes to judge one"
            )
        return self._decided(figures, answers, champion, evidence)

    def _decided(
        self, figures: list[SliceFigure], answers: Answers, champion: Answers | None, evidence: Evidence
    ) -> Finding:
        assert evidence.slices is not None
        names, right = evidence.slices.of(answers.image_ids), answers.right
        tests: list[tuple[float, SliceFigure, str]] = []
        for figure in figures:
            inside = names[figure.kind] == figure.name
            if champion is not None:
                tests.append((p_worse(right[inside], champion.right[inside], margin=self.margin), figure, "champion"))
            if self.floor is not None:
                tests.append((p_under(int(right[inside].sum()), figure.n, self.floor), figure, "floor"))
        corrected = holm([p for p, _, _ in tests])
        shown = [(p, figure, against) for p, (_, figure, against) in zip(corrected, tests, strict=True) if p <= SHOWN_AT]
        if shown:
            p, figure, against = min(shown, key=lambda one: one[0])
            limit = f"margin {self.margin:g}" if against == "champion" else f"floor {self.floor:g}"
            others = f"; and {counted(len(shown) - 1, 'other')} shown" if len(shown) > 1 else ""
            among = f"shown among {counted(len(figures), 'slice')} (p {p:.2g} after Holm's correction){others}"
            return self._finding("fail", figure, f"{_told(figure)}, {limit}: {among}", against)
        if self.floor is not None:
            low = min(figures, key=lambda one: one.accuracy.low)
            if compare_interval(low.accuracy, self.floor) != "pass":
                needed = enough(
                    lambda n: compare_interval(wilson(round(low.accuracy.value * n), n), self.floor or 0) != "inconclusive",
                    low.n,
                )
                return self._finding(
                    "inconclusive",
                    low,
                    f"{_told(low)}, floor {self.floor:g}: {too_few('test images in it', low.n, needed)}",
                    "floor",
                )
        worst = (
            figures[0] if champion is None else min(figures, key=lambda one: one.to_champion.low if one.to_champion else 0.0)
        )
        hidden = f"; at most {-min(0.0, worst.to_champion.low):.3f} could be hidden there" if worst.to_champion else ""
        return self._finding(
            "pass",
            worst,
            f"none of {counted(len(figures), 'slice')} is shown to be worse; least sure is {_told(worst)}{hidden}",
            "floor" if champion is None else "champion",
        )

    def _finding(self, status: FindingStatus, figure: SliceFigure, message: str, against: str) -> Finding:
        is_paired = against == "champion" and figure.to_champion is not None
        return Finding(
            gate="slices",
            status=status,
            message=message,
            value=figure.to_champion.value if is_paired and figure.to_champion else figure.accuracy.value,
            threshold=-self.margin if is_paired else self.floor,
            n=figure.n,
        )


def _told(figure: SliceFigure) -> str:
    told = f"{figure.kind} {figure.name!r}: {figure.accuracy}"
    if figure.champion is None or figure.to_champion is None:
        return told
    by = figure.to_champion
    return f"{told}, the champion's {figure.champion.value:.4f}: difference {by.value:+.4f} [{by.low:+.4f}, {by.high:+.4f}]"


def _undecided(message: str) -> Finding:
    return Finding(gate="slices", status="inconclusive", message=message)
