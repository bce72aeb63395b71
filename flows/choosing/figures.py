"""Figures of a choice's page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from markupsafe import Markup

from components.variant_rule import not_beaten
from components.variants import Choice, Variant
from flows.pages.figures import BLUE, GREY, INK, ORANGE, as_svg, in_words

_PALE = "#c3cad3"
Costs = Callable[[Variant], Sequence[float]]
"""What a variant costs: as it counts, and in each round of the measurement."""


def pareto_figure(choice: Choice, numbers: Mapping[str, int], costs: Costs, label: str, floor: float | None) -> Markup:
    """The headline metric of each variant against what it costs; a line joins those that no other one beats in both.

    Variants have their numbers of the table beside them; those that miss a limit are crosses.
    """
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    measured = [one for one in choice.variants if one.status == "measured"]
    front = not_beaten(measured, lambda one: costs(one)[0])
    figure, axes = pyplot.subplots(figsize=(9, 4))
    for one in measured:
        assert one.headline is not None
        place, *rounds = costs(one)
        share, is_chosen = one.headline, one.name == choice.chosen
        spread = {
            "xerr": [[max(0.0, place - min(rounds))], [max(0.0, max(rounds) - place)]],
            "yerr": [[share.value - share.low], [share.high - share.value]],
        }
        axes.errorbar(place, share.value, **spread, fmt="none", ecolor=_PALE, capsize=2, linewidth=0.8, zorder=0)
        colour = ORANGE if is_chosen else BLUE if one in front else GREY
        over = 4 if is_chosen else 3 if one in front else 2
        marker = "X" if one.missed else "o"
        axes.scatter([place], [share.value], s=110 if is_chosen else 46, color=colour, marker=marker, zorder=over)
    for place, value, name, height in _labels(measured, costs):
        axes.annotate(
            str(numbers[name]),
            (place, value),
            xytext=(5, 5 + 11 * height),
            textcoords="offset points",
            color=INK,
            weight="bold" if name == choice.chosen else "normal",
            zorder=6,
        )
    shares = [one.share for one in front]
    axes.plot([costs(one)[0] for one in front], shares, color=BLUE, linestyle="--", linewidth=1, zorder=1)
    if floor is not None:
        axes.axhline(floor, color=ORANGE, linestyle=":", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.12)
    axes.set_xlabel(label)
    axes.set_ylabel(f"valid {in_words(choice.headline)}, 95 % interval")
    axes.grid(color="#eceff3")
    return as_svg(figure)


def _labels(variants: Sequence[Variant], costs: Costs) -> Iterator[tuple[float, float, str, int]]:
    """Where the number of each variant stands, and how many lines above its point, so that neighbours' do not meet."""
    places = [math.log(costs(one)[0]) for one in variants]
    shares = [one.share for one in variants]
    drawn = [math.log(cost) for one in variants for cost in costs(one)]
    wide, high = (max(of) - min(of) or 1.0 for of in (drawn, shares))
    before: tuple[float, float, int] | None = None
    for share, place, name in sorted(zip(shares, places, (one.name for one in variants), strict=True)):
        near = before is not None and place - before[0] < 0.04 * wide and share - before[1] < 0.04 * high
        height = (before[2] + 1) % 4 if before is not None and near else 0
        before = (place, share, height)
        yield math.exp(place), share, name, height
