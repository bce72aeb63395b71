"""Figures of a study's page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup

from flows.pages.figures import BLUE, GREY, ORANGE, as_svg
from flows.tuning.space import Parameter, Value
from flows.tuning.study import Trial

_COLUMNS = 3


def history_figure(trials: Sequence[Trial], best: Trial, objective: str, *, highest: bool) -> Markup:
    """What each trial came to, and the best so far; trials that were stopped stand at their last epoch."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 3.2))
    complete = [trial for trial in trials if trial.value is not None]
    axes.scatter([one.number for one in complete], [one.value for one in complete], s=26, color=BLUE, label="complete")
    stopped = [trial for trial in trials if trial.state == "pruned" and trial.curve]
    if stopped:
        lasts = [one.curve[max(one.curve)] for one in stopped]
        axes.scatter([one.number for one in stopped], lasts, s=26, color=GREY, marker="x", label="stopped early")
    numbers: list[int] = []
    values: list[float] = []
    for trial in complete:
        assert trial.value is not None
        so_far = trial.value if not values else (max if highest else min)(values[-1], trial.value)
        numbers.append(trial.number)
        values.append(so_far)
    axes.step(numbers, values, where="post", color=ORANGE, linewidth=1.2, label="best so far")
    axes.scatter([best.number], [best.value], s=90, facecolors="none", edgecolors=ORANGE, linewidths=1.5)
    axes.set_xlabel("trial")
    axes.set_ylabel(objective)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="#eceff3")
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return as_svg(figure)


def importance_figure(shares: Mapping[str, float]) -> Markup:
    """How much of what differs goes with each parameter."""
    from matplotlib import pyplot

    names = list(shares)[::-1]
    figure, axes = pyplot.subplots(figsize=(9, 0.34 * len(names) + 0.7))
    axes.barh([name.removeprefix("training.") for name in names], [shares[name] for name in names], color=BLUE)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel("share of the importance (PED-ANOVA)")
    return as_svg(figure)


def slices_figure(
    trials: Sequence[Trial], parameters: Sequence[Parameter], best: Trial, own: Mapping[str, Value], objective: str
) -> Markup:
    """The objective against each parameter; a dotted line stands at the recipe's own value."""
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    rows = -(-len(parameters) // _COLUMNS)
    figure, grid = pyplot.subplots(rows, _COLUMNS, figsize=(9, 2.5 * rows), squeeze=False, sharey=True)
    complete = [trial for trial in trials if trial.value is not None]
    for axes, parameter in zip(grid.flat, parameters, strict=False):
        places = _places(parameter)
        for trial in complete:
            is_best = trial is best
            axes.scatter(
                [places(trial.params[parameter.key])],
                [trial.value],
                s=40 if is_best else 18,
                color=ORANGE if is_best else BLUE,
                alpha=1 if is_best else 0.7,
                zorder=3 if is_best else 2,
            )
        if parameter.key in own:
            axes.axvline(places(own[parameter.key]), color=GREY, linestyle=":", linewidth=1)
        if parameter.kind == "choice":
            labels = [label if len(label) < 14 else f"{label[:12]}\u2026" for label in parameter.labels]
            axes.set_xticks(range(len(labels)), labels, rotation=20 if len(labels) > 3 else 0)
            axes.set_xlim(-0.5, len(labels) - 0.5)
        elif parameter.dimension.log:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(parameter.short)
        axes.grid(axis="y", color="#eceff3")
    for axes in grid.flat[len(parameters) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel(objective)
    figure.tight_layout()
    return as_svg(figure)


def learning_figure(trials: Sequence[Trial], best: Trial, objective: str) -> Markup:
    """The objective by epoch of the last phase, the best trial in front; dotted are those that were stopped."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 3.2))
    for trial in trials:
        if trial is best or not trial.curve:
            continue
        style = ":" if trial.state == "pruned" else "-"
        axes.plot(list(trial.curve), list(trial.curve.values()), style, color=GREY, linewidth=1, alpha=0.7)
    axes.plot(list(best.curve), list(best.curve.values()), color=ORANGE, linewidth=1.8, marker="o", markersize=3)
    axes.plot([], [], color=ORANGE, linewidth=1.8, label=f"trial {best.number}, the best")
    axes.plot([], [], color=GREY, label="other trials")
    axes.plot([], [], ":", color=GREY, label="stopped early")
    axes.set_xlabel("epoch of the last phase")
    axes.set_ylabel(objective)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="#eceff3")
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return as_svg(figure)


def _places(parameter: Parameter) -> Callable[[Value], float]:
    """Where a value stands on the axis of its parameter."""
    if parameter.kind == "choice":
        return lambda value: parameter.labels.index(str(value))
    return float
