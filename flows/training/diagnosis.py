"""What the history of a training and the number of images of each class say, in words that their numbers support.

A share is told with its interval, and a difference of shares is only told as one where its whole interval says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from components.contracts.verdicts import ClassMetrics, Estimate
from components.contracts.wording import counted
from components.intervals import difference, wilson
from components.phases import Phase

_IMBALANCED = 3.0
"""Times as many images of the largest class as of the smallest, from which on recall is looked at."""
_RAREST = 3
_MANY_ERRORS = 0.05
"""Share of train images answered wrong below which nobody would call a network under-fitted."""
_ROSE = 1.05
"""Times the lowest valid loss from which on it is said to have risen."""


@dataclass(frozen=True)
class PhaseResult:
    """What a phase came to."""

    number: int
    part: str
    """What trained, in words."""
    first_epoch: int
    last_epoch: int
    best: Mapping[str, float]
    """The history's row of the best epoch, from which the next phase went on."""
    last: Mapping[str, float]
    valid: Estimate | None
    """Share of valid images answered right at the best epoch; None where there are none."""
    train: Estimate | None
    """The same of train images as they are, where it was asked."""
    gain: Estimate | None
    """Share of valid images more than after the phase before; None for the first, and where it is not known."""
    left_out: Estimate | None = None
    """Share of train images answered right by a head that was computed without them; None of a head fitted in steps."""
    computed: bool = False
    """Whether it is a head that was computed in one step."""

    @property
    def best_epoch(self) -> int:
        """Numbered through all phases, as the curves are."""
        return int(self.best["epoch"])


def phase_results(
    history: Sequence[Mapping[str, float]], phases: Sequence[Phase], headline: str, num_valid: int
) -> list[PhaseResult]:
    """One a phase, in order; a history of one phase says no phase."""
    found: list[PhaseResult] = []
    for number, phase in enumerate(phases, 1):
        rows = [row for row in history if row.get("phase", 1) == number]
        computed = phase.head is not None
        best = rows[0] if computed else min(rows, key=lambda row: row["valid_loss"])
        valid = _share(best[f"valid_{headline}"], num_valid) if num_valid else None
        before = found[-1].valid if found else None
        left_out = best.get(f"left_out_{headline}")
        asked = f"train_{headline}" in best
        found.append(
            PhaseResult(
                number=number,
                part=phase.part,
                first_epoch=int(rows[0]["epoch"]),
                last_epoch=int(rows[-1]["epoch"]),
                best=best,
                last=rows[-1],
                valid=valid,
                train=_share(best[f"train_{headline}"], int(best["train_images"])) if asked else None,
                gain=difference(valid, before) if valid and before else None,
                left_out=None if left_out is None else _share(left_out, int(best["left_out"])),
                computed=computed,
            )
        )
    return found


def _share(value: float, n: int) -> Estimate:
    return wilson(round(value * n), n)


def percent(share: Estimate) -> str:
    """A share with its interval, in words."""
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})".replace("%", "\u00a0%")


def points(gap: Estimate, *, sign: str = "") -> str:
    """A difference of shares with its interval, in percentage points."""
    return f"{gap.value * 100:{sign}.1f} points ({gap.low * 100:{sign}.1f} to {gap.high * 100:{sign}.1f})"


def gain_told(result: PhaseResult) -> str:
    """What a phase bought over the one before, in words; empty for the first."""
    if result.gain is None:
        return ""
    if result.gain.low > 0:
        return f"{points(result.gain, sign='+')}: better"
    if result.gain.high < 0:
        return f"{points(result.gain, sign='+')}: worse"
    return f"{points(result.gain, sign='+')}: no difference is shown"


def fit_told(results: Sequence[PhaseResult], phases: Sequence[Phase], headline: str) -> list[str]:
    """Whether the network over- or under-fits, as far as that is known, and whether it had trained to the end."""
    result, fit = results[-1], phases[-1].fit
    if result.computed:
        return _of_computed(result)
    told = _by_shares(result, result.train) if result.train is not None else _by_losses(result, headline)
    # A rate that falls to nothing ends where the loss is lowest in any case.
    going_on = fit.schedule in ("constant", "step", "cyclical")
    if going_on and result.best_epoch == result.last_epoch and result.last_epoch - result.first_epoch + 1 == fit.epochs:
        told.append("The valid loss was lowest in the very last epoch: it may not have trained to the end. Try more epochs.")
    return told


def _of_computed(result: PhaseResult) -> list[str]:
    strength = result.best["ridge_strength"]
    how = "the mean of each class" if strength == 0 else f"ridge regression of strength {strength:g}"
    told = [f"The head was computed in one step, as {how}, from frozen embeddings: there are no epochs, and no curve."]
    if result.left_out is None:
        return [*told, "Every class has one train image, so none could be left out: how good it is, test alone says."]
    told.append(
        f"Left out in turns, {percent(result.left_out)} of {counted(result.left_out.n, 'train image')} are answered right "
        f"by heads that were computed without them; by these answers the kind of the head and the temperature were chosen."
    )
    if result.valid is not None:
        told.append(f"Of {counted(result.valid.n, 'valid image')} {percent(result.valid)} are answered right.")
    return told


def _by_shares(result: PhaseResult, train: Estimate) -> list[str]:
    assert result.valid is not None  # by which a fit chose its epoch
    valid, gap = result.valid, difference(train, result.valid)
    told = [
        f"Of {counted(train.n, 'train image')}, as they are, {percent(train)} are answered right, and of "
        f"{counted(valid.n, 'valid image')} {percent(valid)}: a gap of {points(gap)}."
    ]
    under = 1 - train.high > max(_MANY_ERRORS, gap.high)
    if gap.low > 0:
        told.append(
            f"Over-fitting: it does at least {gap.low * 100:.1f} points better on images that it has learned from than on "
            f"others. More images, augmentations, a higher weight_decay or fewer blocks that train help against that."
        )
    if under:
        told.append(
            f"Under-fitting: at least {1 - train.high:.1%} of the train images are answered wrong too, which is more than "
            f"the gap can be. More blocks that train, a larger network, more epochs or a higher rate help; or the labels "
            f"are wrong.".replace("%", "\u00a0%")
        )
    if not under and gap.low <= 0:
        told.append(
            f"Neither over- nor under-fitting is shown; a gap of up to {gap.high * 100:.1f} points may be there unseen."
        )
    return told


def _by_losses(result: PhaseResult, headline: str) -> list[str]:
    best, last, valid = result.best, result.last, result.valid
    assert valid is not None  # by which a fit chose its epoch
    told = [
        f"At the best epoch, {result.best_epoch} of {result.last_epoch}, {percent(valid)} of "
        f"{counted(valid.n, 'valid image')} are answered right; the train loss is {_loss(best['train_loss'])} there and the "
        f"valid loss {_loss(best['valid_loss'])}."
    ]
    # Among losses of next to nothing a ratio says nothing.
    rose = last["valid_loss"] > max(_ROSE * best["valid_loss"], _LEAST_LOSS)
    if rose and last["train_loss"] < best["train_loss"]:
        lost = difference(valid, _share(last[f"valid_{headline}"], valid.n))
        told.append(
            f"After that the curves point to over-fitting: by epoch {result.last_epoch} the train loss had fallen to "
            f"{_loss(last['train_loss'])} while the valid loss rose to {_loss(last['valid_loss'])}. "
            + (
                f"At least {lost.low * 100:.1f} points fewer valid images were answered right by then. "
                if lost.low > 0
                else "The share of valid images answered right shows no difference. "
            )
            + f"The weights of epoch {result.best_epoch} are kept."
        )
    elif result.best_epoch < result.last_epoch:
        told.append("After that the valid loss fell no further.")
    told.append(
        "How much it over-fits is not known: the train loss is measured while the network changes, on augmented images "
        "where there are augmentations, and a loss has no interval here."
    )
    return told


_LEAST_LOSS = 0.001
"""The lowest that is told as a number."""


def _loss(value: float) -> str:
    return f"{value:.3f}" if value >= _LEAST_LOSS else f"less than {_LEAST_LOSS}"


@dataclass(frozen=True)
class Imbalance:
    """How evenly the train images are spread over the classes, and what that does to the rarest, in words."""

    said: str
    rare: tuple[str, ...] = ()
    """Recall of the rarest classes beside that of all others, where the classes are not balanced."""
    advice: str = ""


def imbalance(
    counts: Mapping[str, int], per_class: Sequence[ClassMetrics], phases: Sequence[Phase], *, one_class: bool
) -> Imbalance:
    """Of `counts`, the train images of each class; `one_class`: whether the task takes sampling and losses of its own."""
    smallest, largest = min(counts, key=lambda name: counts[name]), max(counts, key=lambda name: counts[name])
    ratio = f"{counts[largest] / counts[smallest]:.1f} to 1"
    if counts[largest] < _IMBALANCED * counts[smallest]:
        return Imbalance(
            f"The classes are about balanced: from {counts[smallest]} ({smallest!r}) to {counts[largest]} ({largest!r}) "
            f"train images, {ratio}."
        )
    said = (
        f"The classes are not balanced: {counted(counts[largest], 'train image')} of {largest!r} and "
        f"{counts[smallest]} of {smallest!r}, {ratio}."
    )
    ranked = sorted((m for m in per_class if m.name in counts), key=lambda m: (counts[m.name], m.name))
    rare = [m for m in ranked[:_RAREST] if counts[largest] >= _IMBALANCED * counts[m.name]]
    others = [m for m in per_class if m not in rare]
    if not rare or not others:
        return Imbalance(said)
    rest = wilson(sum(round(m.recall.value * m.support) for m in others), sum(m.support for m in others))
    behind = {m.name: difference(rest, m.recall) for m in rare}
    lines = [f"{m.name!r}: recall {percent(m.recall)}, n = {m.support}; {_behind(behind[m.name])}" for m in rare]
    lines.append(f"all other classes together: recall {percent(rest)}, n = {rest.n}")
    return Imbalance(said, tuple(lines), _advice(phases, any(gap.low > 0 for gap in behind.values()), one_class))


def _behind(gap: Estimate) -> str:
    if gap.low > 0:
        return f"at least {gap.low * 100:.1f} points below the others"
    if gap.high < 0:
        return f"at least {-gap.high * 100:.1f} points above the others"
    return f"no difference is shown, and it may be up to {gap.high * 100:.1f} points below the others"


def _advice(phases: Sequence[Phase], suffering: bool, one_class: bool) -> str:
    balanced = any(
        phase.sampling == "balanced" or (phase.loss is not None and phase.loss.loss == "class_weighted") for phase in phases
    )
    more = "more images of the rare classes" + (" help most" if suffering else " would tell, in train and test")
    if balanced:
        return f"Balanced sampling or the class-weighted loss was at work; {more}."
    if suffering and one_class:
        return (
            f"What to do: {more}; else try sampling: balanced, or loss: {{loss: class_weighted}}, in a phase of the recipe."
        )
    return f"What to do: {more}."
