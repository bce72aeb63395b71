"""The report: one self-contained HTML page with the pictures a person wants before approving a model."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import pandas as pd
from markupsafe import Markup

from components.contracts import Candidate, Estimate, Evaluation, Rejection, Splits, Stored, counted
from components.gating import policy
from components.images import decode
from components.tables import read_frame
from flows.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from flows.evidence import Results

_INK, _BLUE, _ORANGE, _GREY = "#1c2430", "#2563a8", "#c2571a", "#9aa4b1"
_TEMPLATES = Path(__file__).resolve().parent / "templates"
_SHOWN = 12
VERDICTS = {"pass": "candidate", "fail": "rejected", "inconclusive": "undecided"}
"""What a verdict makes of a model: what the test images do not decide was not rejected for what it is."""


def render(run: Run, results: Results, outcome: Candidate | Rejection | None, notes: Sequence[str]) -> str:
    """HTML of the report; `outcome` is None in the copy that is registered, which cannot know its own version.

    `notes` are what the ledger says of earlier gate policies and of rejections of the same weights.
    """
    shown = _shown(results)
    verdict = results.verdict.record
    version = outcome.version if isinstance(outcome, Candidate) else ""
    title = f"candidate, version {version}" if version else VERDICTS[verdict.status]
    new, gone = results.classes_changed
    return (
        environment()
        .get_template("report.html")
        .render(
            model=run.config.model,
            outcome_title=title,
            version=version,
            registered=outcome is None,
            run_id=run.id,
            lineage=run.lineage,
            verdict=verdict,
            notes=notes,
            champion=results.reigning.version if results.reigning else "",
            classes_new=new,
            classes_gone=gone,
            engines=[
                _engine_row(*found) for found in zip(results.engines, results.evaluations, results.measurements, strict=True)
            ],
            n_test=shown.record.num_images,
            machine=results.measurements[0].record.machine,
            checkpoint=results.checkpoint.record,
            splits=results.splits.record,
            dataset=results.dataset.record,
            shown=shown.record.engine,
            per_class=[
                {"name": m.name, "support": m.support, "cells": [_cell(e) for e in (m.precision, m.recall, m.f1)]}
                for m in shown.record.per_class
            ],
            figures=_figures(results, shown),
            mistakes=_mistakes(run, shown),
            examples=_examples(run, results),
            quarantined=read_frame(results.dataset.folder / results.dataset.record.quarantine.name)
            .head(20)
            .to_dict("records"),
            provenance=_provenance(run, results),
        )
    )


def environment() -> jinja2.Environment:
    """Templates that escape whatever they are given."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )


def model_card(run: Run, results: Results) -> str:
    """What a user of the model has to know, in Markdown."""
    shown, checkpoint, verdict = _shown(results).record, results.checkpoint.record, results.verdict.record
    new, gone = results.classes_changed
    champion = f"the champion, version {results.reigning.version}," if results.reigning else ""
    lines = [
        f"# {run.config.model}",
        "",
        run.config.description,
        "",
        f"- Task: {checkpoint.task} into {counted(len(checkpoint.classes), 'class')}: {', '.join(checkpoint.classes)}",
        f"- Backbone: {checkpoint.backbone}; weights: {run.config.training.weights}; mode: {run.config.training.mode}",
        f"- Input: {checkpoint.preprocessing.width}x{checkpoint.preprocessing.height} pixels, "
        f"{checkpoint.preprocessing.channels} channel(s), uint8; scaling is inside the engine",
        f"- Data version {run.data.dvc_hash}, git {run.lineage.git_commit}; "
        f"{counted(results.dataset.record.num_kept, 'image')} kept, {results.dataset.record.num_quarantined} quarantined",
        f"- Verdict: {VERDICTS[verdict.status]}; serving engine: {verdict.serving_engine}",
        *([f"- New classes, which {champion} does not know: {', '.join(new)}"] if new else []),
        *([f"- Classes that {champion} knows and this model does not: {', '.join(gone)}"] if gone else []),
        "",
        f"## Measured on the frozen test split, {shown.engine}, 95 % intervals",
        "",
        "| metric | value | interval | n |",
        "|---|---|---|---|",
        *(f"| {name} | {e.value:.4f} | {e.low:.4f} to {e.high:.4f} | {e.n} |" for name, e in shown.metrics.items()),
        "",
        "## Gates that judged it",
        "",
        *(f"- {line}" for line in _gates(run)),
        "",
        "## Limits",
        "",
        "These figures hold for images like the test split's. Nothing is claimed about other cameras, other classes or "
        "pictures that hold none of the classes.",
        "",
    ]
    return "\n".join(lines)


def _gates(run: Run) -> list[str]:
    """One line a gate: its settings, defaults included, and the engines it judges."""
    settings = policy(run.config.gating)
    return [
        f"{chosen.gate}: {', '.join(f'{name} {value}' for name, value in settings[f'{index}:{chosen.gate}'].items())}"
        + (f" (only {', '.join(chosen.engines)})" if chosen.engines else "")
        for index, chosen in enumerate(run.config.gating.gates)
    ]


def _shown(results: Results) -> Stored[Evaluation]:
    """The serving engine's evaluation, or the reference's where that engine could not run."""
    for evaluation in results.evaluations:
        if evaluation.record.engine == results.verdict.record.serving_engine and evaluation.record.metrics:
            return evaluation
    return results.evaluations[0]


def _cell(estimate: Estimate | None) -> tuple[str, str]:
    if estimate is None:
        return "never predicted", ""
    return f"{estimate.value:.4f}", f"{estimate.low:.4f} to {estimate.high:.4f}"


def _engine_row(engine: Any, evaluation: Any, measurement: Any) -> dict[str, Any]:
    metrics, measured = evaluation.record.metrics, measurement.record
    latency = (measured.latency_p50_ms, measured.latency_p90_ms, measured.latency_p99_ms)
    return {
        "name": engine.record.name,
        "runtime": engine.record.runtime,
        "built_for": ", ".join(engine.record.built_for),
        "executed": bool(metrics),
        "reason": evaluation.record.reason,
        "cells": [_cell(metrics.get(name)) for name in ("accuracy", "mean_class_accuracy", "log_loss", "ece")],
        "latency": " / ".join("-" if value is None else f"{value:.2f}" for value in latency),
        "size": _size(measured.size_bytes),
    }


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.2f} MB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:.1f} kB"


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
            "axes.edgecolor": _GREY,
            "axes.labelcolor": _INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )


def _figures(results: Results, shown: Stored[Evaluation]) -> dict[str, Markup]:
    prepare_figures()
    return {
        "engines": engine_figure(results.evaluations),
        "curves": curves_figure(results.history),
        "splits": splits_figure(results.splits.record),
        "confusion": confusion_figure(shown.record),
        "reliability": _reliability_figure(shown.record),
    }


def as_svg(figure: Figure) -> Markup:
    """The figure as SVG to be put into a page; closes it."""
    from matplotlib import pyplot

    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    svg = text.getvalue()
    return Markup(svg[svg.index("<svg") :])  # noqa: S704  (drawn by matplotlib, which escapes every label)


def engine_figure(evaluations: Sequence[Stored[Evaluation]]) -> Markup:
    """Accuracy of every engine that was executed."""
    from matplotlib import pyplot

    executed = [e.record for e in evaluations if "accuracy" in e.record.metrics]
    figure, axes = pyplot.subplots(figsize=(9, 0.4 * len(executed) + 0.8))
    for place, evaluation in enumerate(reversed(executed)):
        e = evaluation.metrics["accuracy"]
        axes.errorbar(e.value, place, xerr=[[e.value - e.low], [e.high - e.value]], fmt="o", color=_BLUE, capsize=3)
    axes.set_yticks(range(len(executed)), [evaluation.engine for evaluation in reversed(executed)])
    axes.set_xlabel("accuracy, 95 % interval")
    axes.grid(axis="x", color="#eceff3")
    return as_svg(figure)


def curves_figure(history: list[dict[str, float]]) -> Markup:
    """Losses and accuracy by epoch."""
    from matplotlib import pyplot

    frame = pd.DataFrame(history)
    figure, axes = pyplot.subplots(figsize=(5, 3))
    axes.plot(frame["epoch"], frame["train_loss"], color=_GREY, label="train loss")
    axes.plot(frame["epoch"], frame["valid_loss"], color=_BLUE, label="valid loss")
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    right = axes.twinx()
    right.plot(frame["epoch"], frame["valid_accuracy"], color=_ORANGE, label="valid accuracy")
    right.set_ylabel("accuracy")
    lines = [*axes.get_lines(), *right.get_lines()]
    # Above the axes: inside, there is no corner that some curve does not pass.
    labels = [str(line.get_label()) for line in lines]
    axes.legend(lines, labels, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return as_svg(figure)


def splits_figure(splits: Splits) -> Markup:
    """Images a class, by split."""
    from matplotlib import pyplot

    classes = list(splits.classes)[:40]
    figure, axes = pyplot.subplots(figsize=(5, max(2.0, 0.26 * len(classes) + 0.8)))
    left = [0] * len(classes)
    for (name, counts), color in zip(splits.class_counts.items(), (_BLUE, _ORANGE, _GREY, _INK), strict=True):
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
    shares = [[value / max(1, sum(row)) for value in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(counts) <= 20:
        for i, row in enumerate(counts):
            for j, value in enumerate(row):
                if value:
                    axes.text(j, i, str(value), ha="center", va="center", color="white" if shares[i][j] > 0.5 else _INK)
        axes.set_xticks(range(len(names)), names, rotation=45 if max(map(len, names), default=0) > 3 else 0)
        axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    return as_svg(figure)


def _reliability_figure(evaluation: Evaluation) -> Markup:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4.4))
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle="--", linewidth=1)
    if evaluation.reliability:
        confidence, accuracy, counts = zip(*evaluation.reliability, strict=True)
        sizes = [12 + 240 * count / max(counts) for count in counts]
        axes.scatter(confidence, accuracy, s=sizes, color=_BLUE, alpha=0.7)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("mean confidence of a bin (area: images in it)")
    axes.set_ylabel("accuracy of the bin")
    return as_svg(figure)


def _mistakes(run: Run, shown: Stored[Evaluation]) -> list[dict[str, Any]]:
    if shown.record.predictions is None:
        return []
    columns = ["path", "label", "predicted", "confidence"]
    frame = read_frame(shown.folder / shown.record.predictions.name, columns)
    wrong = frame[frame["label"] != frame["predicted"]].nlargest(_SHOWN, "confidence")
    names = [metrics.name for metrics in shown.record.per_class]
    return [
        {
            "path": row["path"],
            "label": names[row["label"]],
            "predicted": names[row["predicted"]],
            "confidence": row["confidence"],
            "image": _thumbnail(run.workspace.data / row["path"]),
        }
        for row in wrong.to_dict("records")
    ]


def _examples(run: Run, results: Results) -> list[dict[str, Any]]:
    table = read_frame(results.splits.folder / results.splits.record.table.name)
    chosen = table[table["split"] == "train"].groupby("label", sort=True).head(2).head(2 * _SHOWN)
    return [
        {"path": row["path"], "label": row["label"], "image": _thumbnail(run.workspace.data / row["path"])}
        for row in chosen.to_dict("records")
    ]


def _thumbnail(path: Path) -> str:
    image = decode(path.read_bytes()).srgb().copy()
    image.thumbnail((160, 160))
    data = io.BytesIO()
    image.save(data, format="PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def _provenance(run: Run, results: Results) -> list[tuple[str, str]]:
    lineage = run.lineage
    return [
        ("run", run.id),
        ("recipe", f"{lineage.recipe} (config {lineage.config_digest[:16]})"),
        ("data version", lineage.data_version),
        ("test ledger", results.dataset.record.data.ledger_sha256),
        ("test split", results.splits.record.test_digest),
        ("weights", results.checkpoint.record.weights.sha256),
        ("git commit", lineage.git_commit + (" with uncommitted changes" if lineage.git_dirty else "")),
        ("code", lineage.code_version),
        ("locked libraries", lineage.lock_digest),
        ("gate policy", results.verdict.record.policy_digest),
    ]
