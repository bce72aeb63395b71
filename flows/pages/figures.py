"""Figures of the pages: SVG with text in it, the same bytes for the same data."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import pandas as pd
from markupsafe import Markup

from components.contracts.data import Splits
from components.contracts.records import Stored
from components.contracts.verdicts import Evaluation, Measurement
from components.images import decode
from components.selective import RiskCoverage

if TYPE_CHECKING:
    from matplotlib.figure import Figure


INK, BLUE, ORANGE, GREY = "#1c2430", "#2563a8", "#c2571a", "#9aa4b1"
_LINES = 4
"""In which the names of engines stand, in turn, so that those of engines that are alike do not cover each other."""
TEMPLATES = Path(__file__).resolve().parent / "templates"


def environment() -> jinja2.Environment:
    """Templates that escape whatever they are given."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )


def prepare_figures() -> None:
    """Matplotlib as every page of ours uses it: SVG with text in it, the same bytes for the same data."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "visionloop",
            "svg.fonttype": "none",
            # Class names are text, whatever dollars they hold.
            "text.parse_math": False,
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
            "font.size": 9,
            "axes.edgecolor": GREY,
            "axes.labelcolor": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )


def as_svg(figure: Figure) -> Markup:
    """The figure as SVG to be put into a page; closes it."""
    from matplotlib import pyplot

    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    svg = text.getvalue()
    return Markup(svg[svg.index("<svg") :])  # noqa: S704  (drawn by matplotlib, which escapes every label)


def in_words(metric: str) -> str:
    """A metric as people read it."""
    return {"log_loss": "log-loss", "ece": "ECE"}.get(metric, metric.replace("_", " "))


def engine_figure(evaluations: Sequence[Stored[Evaluation]], headline: str) -> Markup:
    """The headline metric of every engine that was executed."""
    from matplotlib import pyplot

    executed = [e.record for e in evaluations if headline in e.record.metrics]
    figure, axes = pyplot.subplots(figsize=(9, 0.4 * len(executed) + 0.8))
    for place, evaluation in enumerate(reversed(executed)):
        e = evaluation.metrics[headline]
        axes.errorbar(e.value, place, xerr=[[e.value - e.low], [e.high - e.value]], fmt="o", color=BLUE, capsize=3)
    axes.set_yticks(range(len(executed)), [evaluation.engine for evaluation in reversed(executed)])
    axes.set_xlabel(f"{in_words(headline)}, 95 % interval")
    axes.grid(axis="x", color="#eceff3")
    return as_svg(figure)


def pareto_figure(
    evaluations: Sequence[Stored[Evaluation]], measurements: Sequence[Stored[Measurement]], headline: str, serving: str
) -> Markup:
    """The headline metric of every engine that was executed against its latency; area is size on disk.

    The line joins the engines that no other one beats in both.
    """
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    points = [
        (measured.record.latency_p50_ms, evaluation.record.metrics[headline], measured.record)
        for evaluation, measured in zip(evaluations, measurements, strict=True)
        if headline in evaluation.record.metrics and measured.record.latency_p50_ms is not None
    ]
    figure, axes = pyplot.subplots(figsize=(9, 3.4))
    largest = max((measured.size_bytes for _, _, measured in points), default=1) or 1
    front: list[tuple[float, float]] = []
    for number, (latency, value, measured) in enumerate(sorted(points, key=lambda point: (point[0], -point[1].value))):
        colour = ORANGE if measured.engine == serving else BLUE
        spread = [[value.value - value.low], [value.high - value.value]]
        axes.errorbar(latency, value.value, yerr=spread, fmt="none", ecolor=GREY, capsize=3, zorder=1)
        axes.scatter([latency], [value.value], s=20 + 200 * measured.size_bytes / largest, color=colour, alpha=0.8, zorder=2)
        name = measured.engine + (" (serving)" if measured.engine == serving else "")
        # Above the plot, neighbours in lines of their own: engines are often as accurate as each other, and as fast.
        axes.annotate(
            name,
            (latency, value.value),
            xytext=(latency, 1.04 + 0.08 * (number % _LINES)),
            textcoords=("data", "axes fraction"),
            ha="center",
            color=INK,
            arrowprops={"arrowstyle": "-", "color": "#d5dbe3", "linewidth": 0.8},
        )
        if not front or value.value > front[-1][1]:
            front.append((latency, value.value))
    axes.plot(*zip(*front, strict=True) if front else ([], []), color=GREY, linestyle="--", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.25, y=0.25)
    axes.set_xlabel("p50 latency of one image, ms (area: size on disk; dashed: not beaten in both)")
    axes.set_ylabel(f"{in_words(headline)}, 95 % interval")
    axes.grid(color="#eceff3")
    return as_svg(figure)


def epochs_of(history: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """The rows of a history that are epochs: a head that was computed in one step has none."""
    return [row for row in history if "ridge_strength" not in row]


def curves_figure(history: list[dict[str, float]], headline: str, phases: Sequence[tuple[str, int, int]] = ()) -> Markup:
    """Losses and the headline metric by epoch; a phase is what trained, its last epoch and its best one."""
    from matplotlib import pyplot

    frame = pd.DataFrame(epochs_of(history))
    # An epoch alone is a point, which no line shows.
    marker = "o" if len(frame) < 20 else None
    figure, axes = pyplot.subplots(figsize=(9, 3.4))
    axes.plot(frame["epoch"], frame["train_loss"], color=GREY, label="train loss", marker=marker, markersize=3)
    axes.plot(frame["epoch"], frame["valid_loss"], color=BLUE, label="valid loss", marker=marker, markersize=3)
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    right = axes.twinx()
    label = f"valid {in_words(headline)}"
    right.plot(frame["epoch"], frame[f"valid_{headline}"], color=ORANGE, label=label, marker=marker, markersize=3)
    right.set_ylabel(in_words(headline))
    if phases:
        best = frame[frame["epoch"].isin([best for _, _, best in phases])]
        axes.plot(best["epoch"], best["valid_loss"], "o", color=BLUE, markersize=8, fillstyle="none", label="best epoch")
    lines = [*axes.get_lines(), *right.get_lines()]
    for number, (part, last, _) in enumerate(phases if len(phases) > 1 else (), 1):
        first = int(frame["epoch"].iloc[0]) if number == 1 else phases[number - 2][1] + 1
        if number > 1:
            axes.axvline(first - 0.5, color=GREY, linestyle=":", linewidth=1)
        axes.axvspan(first - 0.5, last + 0.5, color="#eceff3" if number % 2 else "white", zorder=0, linewidth=0)
        # What is too narrow for its name has its number alone; the table beside the figure has both.
        name = f"{number}. {part}" if (last - first + 1) * 90 > len(frame) * len(part) else f"{number}."
        place = axes.get_xaxis_transform()
        axes.text((first + last) / 2, 1.02, name, transform=place, ha="center", va="bottom", color=INK)
    # Above the axes: inside, there is no corner that some curve does not pass.
    labels = [str(line.get_label()) for line in lines]
    above = (0.5, 1.08 if len(phases) > 1 else 1.0)
    axes.legend(lines, labels, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=above)
    return as_svg(figure)


def splits_figure(splits: Splits) -> Markup:
    """Images a class, by split."""
    from matplotlib import pyplot

    classes = list(splits.classes)[:40]
    figure, axes = pyplot.subplots(figsize=(5, max(2.0, 0.26 * len(classes) + 0.8)))
    left = [0] * len(classes)
    for (name, counts), color in zip(splits.class_counts.items(), (BLUE, ORANGE, GREY, INK), strict=True):
        widths = [counts.get(label, 0) for label in classes]
        axes.barh(classes, widths, left=left, color=color, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("images")
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return as_svg(figure)


def confusion_figure(evaluation: Evaluation) -> Markup:
    """True classes against predicted ones."""
    from matplotlib import pyplot

    counts = evaluation.confusion
    names = [metrics.name for metrics in evaluation.per_class]
    figure, axes = pyplot.subplots(figsize=(5, 4.4))
    totals = [max(1, sum(row)) for row in counts]
    shares = [[value / total for value in row] for row, total in zip(counts, totals, strict=True)]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(counts) <= 20:
        for i, row in enumerate(counts):
            for j, value in enumerate(row):
                if value:
                    axes.text(j, i, str(value), ha="center", va="center", color="white" if shares[i][j] > 0.5 else INK)
        axes.set_xticks(range(len(names)), names, rotation=45 if max(map(len, names), default=0) > 3 else 0)
        axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    return as_svg(figure)


def reliability_figure(evaluation: Evaluation) -> Markup:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4.4))
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    if evaluation.reliability:
        confidence, accuracy, counts = zip(*evaluation.reliability, strict=True)
        sizes = [12 + 240 * count / max(counts) for count in counts]
        axes.scatter(confidence, accuracy, s=sizes, color=BLUE, alpha=0.7)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("mean confidence of a bin (area: images in it)")
    axes.set_ylabel("accuracy of the bin")
    return as_svg(figure)


def risk_coverage_figure(curve: RiskCoverage) -> Markup:
    """Risk against coverage, with the intervals of the table's points; where the release's rule lies stands out."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 3.4))
    coverages, risks = zip(*curve.curve, strict=True)
    axes.plot(coverages, risks, color=BLUE, linewidth=1.2, label="the engine, by threshold")
    for point, colour in (*((p, BLUE) for p in curve.points), (curve.released, ORANGE)):
        if point is None or point.risk is None:
            continue
        x, risk = point.coverage.value, point.risk
        spread = [[risk.value - risk.low], [risk.high - risk.value]]
        is_released = colour == ORANGE
        axes.errorbar(
            x,
            risk.value,
            yerr=spread,
            fmt="o",
            color=colour,
            ecolor=colour if is_released else GREY,
            capsize=3,
            markersize=7 if is_released else 3,
            zorder=3 if is_released else 2,
            label=f"the release ({_threshold(point.threshold)})" if is_released else None,
        )
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.1%}")
    axes.set_xlabel("coverage: share of the test images that are answered")
    axes.set_ylabel("risk: wrong ones among these")
    axes.grid(color="#eceff3")
    axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return as_svg(figure)


def _threshold(threshold: float | None) -> str:
    return "thresholds by class" if threshold is None else f"threshold {threshold:.3f}"


def thumbnail(path: Path) -> str:
    image = decode(path.read_bytes()).srgb().copy()
    image.thumbnail((160, 160))
    data = io.BytesIO()
    image.save(data, format="PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
