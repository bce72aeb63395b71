"""The page of the loop: what was trained, approved, served, seen and decided, with the pictures a person wants.

One self-contained HTML file for a model of any workspace; the demo adds what only it knows (what was asked before and
after). Pages that need no server are linked by their place, those of MLflow, Prefect and Evidently by their address while
they run.
"""

from __future__ import annotations

import base64
import datetime
import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from components.contracts.data import Splits
from components.contracts.errors import ConfigError, DataError, StoreError
from components.contracts.records import RecordT, Stored
from components.contracts.verdicts import Evaluation, Verdict
from components.contracts.wording import counted, shown_utc
from components.store import read_manifest, write_atomically
from flows.loop.labelling import picture, pictures_of
from flows.loop.loop import Loop
from flows.loop.windows import PAGE, TO_LABEL, realised_accuracy, windows
from flows.pages import figures
from flows.pages.thumbnails import media_type
from flows.terminal import figure
from flows.training.run import stage_folder
from flows.training.serving_check import ServingCheck, with_finding
from monitoring.governor import in_words
from monitoring.verdicts import DriftVerdict
from registry import approval
from registry.ledger import Entry
from registry.policies import by_gates

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"pass": "#1a7f4b", "drift": "#b3261e", "inconclusive": "#9a6700", "no data": "#5d6979"}
_SHOWN = 12
_WINDOWS = 30
"""The latest ones are drawn."""


@dataclass(frozen=True)
class Moment:
    """One thing that happened."""

    at: datetime.datetime
    lane: str
    text: str
    colour: str


def write_loop_report(loop: Loop, path: Path, *, story: Mapping[str, Any] | None = None, pages: Mapping[str, str]) -> Path:
    """Draw the page at `path`, its links relative to it; `story` is the demo's phases. Raises ConfigError."""
    html = render(loop, path.parent, story=story or {}, pages=pages).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, html)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise ConfigError(f"{path} cannot be written ({error.strerror}); name a file elsewhere with --out FILE") from error
    return path


def render(loop: Loop, folder: Path, *, story: Mapping[str, Any], pages: Mapping[str, str]) -> str:
    """HTML of the page that lies in `folder`."""
    figures.prepare_figures()
    entries = loop.ledger.entries(loop.model)
    judged = windows(loop, _WINDOWS)
    champion = approval.champion(entries)
    moments = _moments(loop, entries, judged)
    return (
        figures.environment()
        .get_template("loop.html")
        .render(
            counted=counted,
            model=loop.model,
            champion=champion.body["version"] if champion else None,
            versions=[_version(loop, state, folder) for state in approval.states(entries, _utc_now())],
            timeline=_timeline(moments),
            moments=moments,
            windows=[_window(loop, name, verdict, folder) for name, verdict in judged],
            drift_figure=_drift_figure(judged) if any(v.shifts for _, v in judged) else None,
            decisions=loop.governor.history(loop.model),
            labels=len(loop.labels.latest(loop.model)),
            story=_told(story),
            phases=[(name, facts["phase_s"]) for name, facts in story.items()],
            trails=[found for facts in story.values() for found in facts.get("trail", [])],
            before_after=_before_after(story),
            pages=dict(pages),
            docs=_docs(loop, folder),
        )
    )


def _utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _link(path: Path, folder: Path) -> str | None:
    return Path(os.path.relpath(path, folder)).as_posix() if path.exists() else None


def _docs(loop: Loop, folder: Path) -> list[tuple[str, str]]:
    """Data docs of every run that has some."""
    found = []
    for path in sorted(loop.workspace.runs.glob(f"*/{stage_folder('validation')}/data_docs/index.html")):
        link = _link(path, folder)
        if link is not None:
            found.append((path.parents[2].name, link))
    return found


def _load(place: Path, record: type[RecordT]) -> Stored[RecordT] | None:
    """A published record of a run folder; None where there is none, or it does not verify."""
    try:
        return Stored(record.read(read_manifest(place.resolve())["record"]), place.resolve())
    except (StoreError, OSError):
        return None


def _version(loop: Loop, state: approval.State, folder: Path) -> dict[str, Any]:
    summary = state.requested.body.get("summary") or {}
    headline = summary.get("headline", "accuracy")
    run = loop.workspace.runs / str(summary.get("run"))
    evaluation = _load(run / stage_folder("evaluation") / str(summary.get("serving_engine")), Evaluation)
    splits = _load(run / stage_folder("splitting"), Splits)
    verdict = _load(run / stage_folder("gating"), Verdict)
    served = _load(run / stage_folder("serving_check"), ServingCheck)
    judged = with_finding(verdict.record, served.record.finding) if verdict and served else verdict and verdict.record
    history = run / stage_folder("training") / "history.json"
    drawn: dict[str, Markup] = {}
    epochs = figures.epochs_of(json.loads(history.read_text())) if history.is_file() else []
    if epochs:
        drawn["Training"] = figures.curves_figure(epochs, headline)
    if splits is not None:
        drawn["Splits"] = figures.splits_figure(splits.record)
    if evaluation is not None and evaluation.record.confusion:
        drawn["Confusion on the frozen test split"] = figures.confusion_figure(evaluation.record)
    places = [path for path in sorted((run / stage_folder("evaluation")).glob("*")) if path.name != "champion"]
    executed = [found for path in places if (found := _load(path, Evaluation)) is not None]
    if executed:
        drawn["Engines"] = figures.engine_figure(executed, headline)
    return {
        "version": state.version,
        "status": state.status,
        "summary": summary,
        "headline": figures.in_words(headline),
        "accuracy": _estimate(summary.get("metrics", {}).get(headline)),
        "champion_accuracy": _estimate((summary.get("champion") or {}).get(headline)),
        "requested_by": state.requested.actor.name,
        "requested_at": shown_utc(state.requested.at),
        "decision": state.decision,
        "promoted_at": shown_utc(state.promoted.at) if state.promoted else None,
        "figures": drawn,
        "findings": [(e.engine, e.status, f) for e in judged.engines for f in e.findings] if judged else [],
        "link": _link(run / "report.html", folder),
    }


def _estimate(found: Mapping[str, Any] | None) -> str:
    return figure(found) if found else ""


def _window(loop: Loop, name: str, verdict: DriftVerdict, folder: Path) -> dict[str, Any]:
    accuracy = realised_accuracy(loop, name)
    return {
        "name": name,
        "verdict": verdict,
        "accuracy": _estimate(accuracy),
        "page": _link_to(loop, name, PAGE, folder),
        "to_label": _link_to(loop, name, TO_LABEL, folder),
        "pictures": _pictures(loop, name) if verdict.status == "drift" else [],
    }


def _link_to(loop: Loop, window: str, file: str, folder: Path) -> str | None:
    """None also where the evidence is kept on S3: no browser opens that."""
    path = loop.window_store.path(window, file)
    return _link(path, folder) if path is not None else None


def _pictures(loop: Loop, window: str) -> list[dict[str, str]]:
    """Some of the pictures that were kept, as the window's predictions name them, or why one cannot be shown."""
    found = []
    for shown in pictures_of(loop, window, _SHOWN):
        try:
            data, problem = picture(loop, shown.image_sha256, side=96), ""
        except DataError as error:
            data, problem = b"", f"; {error}"
        image = f"data:{media_type(data)};base64,{base64.b64encode(data).decode()}" if data else ""
        found.append({"image": image, "caption": shown.caption + problem})
    return found


def _moments(loop: Loop, entries: Sequence[Entry], judged: Sequence[tuple[str, DriftVerdict]]) -> list[Moment]:
    found = []
    for entry in entries:
        version = f" version {entry.body['version']}" if "version" in entry.body else ""
        why = entry.body.get("reason") or ""
        kind, by = entry.kind.replace("_", " "), entry.actor.name
        if by_gates(entry):
            kind = "a model was " + ("undecided" if entry.body.get("status") == "inconclusive" else "rejected")
            by = f"the gates (asked for by {by})"
        text = f"{kind}{version} by {by}" + (f": {why}" if why else "")
        found.append(Moment(datetime.datetime.fromisoformat(entry.at), "registry", text, "#2563a8"))
    for _, verdict in judged:
        at = datetime.datetime.fromisoformat(verdict.window.until)
        text = f"window of {counted(verdict.window.rows, 'prediction')}: {verdict.status}"
        text += f" ({verdict.diagnosis}; {', '.join(verdict.detectors)})" if verdict.detectors else ""
        found.append(Moment(at, "watch", text, _COLOURS[verdict.status]))
    for alarm in loop.outbox.alarms(loop.model):
        found.append(Moment(alarm.at, "alarm", f"{alarm.diagnosis}: {', '.join(alarm.detectors)}", "#b3261e"))
    for row in loop.governor.history(loop.model):
        colour = {"granted": "#1a7f4b", "queued": "#9a6700", "refused": "#5d6979"}[row["decision"]]
        text = in_words(row)
        found.append(Moment(datetime.datetime.fromisoformat(row["at"]), "governor", text, colour))
    people: dict[str, tuple[datetime.datetime, int]] = {}
    for label in loop.labels.latest(loop.model).values():
        minute = label.at[:16]
        at, count = people.get(minute, (datetime.datetime.fromisoformat(label.at), 0))
        people[minute] = (at, count + 1)
    found += [Moment(at, "labels", f"{counted(count, 'label')} came back", "#c2571a") for at, count in people.values()]
    return sorted(found, key=lambda moment: moment.at)


def _timeline(moments: Sequence[Moment]) -> Markup | None:
    """When what happened, a lane for each kind."""
    from matplotlib import pyplot

    if not moments:
        return None
    lanes = [lane for lane in ("registry", "watch", "alarm", "governor", "labels") if any(m.lane == lane for m in moments)]
    figure, axes = pyplot.subplots(figsize=(10, 0.45 * len(lanes) + 0.9))
    start = moments[0].at
    minutes = [(moment.at - start).total_seconds() / 60 for moment in moments]
    for moment, minute in zip(moments, minutes, strict=True):
        axes.plot([minute], [lanes.index(moment.lane)], marker="o", markersize=8, color=moment.colour)
    axes.set_yticks(range(len(lanes)), lanes)
    axes.invert_yaxis()
    axes.margins(y=0.3)
    axes.set_xlabel(f"minutes since {start:%Y-%m-%d %H:%M} UTC")
    axes.grid(axis="x", color="#eceff3")
    return figures.as_svg(figure)


def _drift_figure(judged: Sequence[tuple[str, DriftVerdict]]) -> Markup:
    """Effect of each detector by window, as a multiple of what matters."""
    from matplotlib import pyplot

    shown = [(name, verdict) for name, verdict in judged if verdict.shifts][-12:]
    detectors = [shift.detector for shift in shown[-1][1].shifts]
    figure, rows = pyplot.subplots(1, len(detectors), figsize=(2.6 * len(detectors), 2.6), squeeze=False)
    for axes, detector in zip(rows[0], detectors, strict=True):
        _draw_detector(axes, detector, shown)
    figure.tight_layout()
    return figures.as_svg(figure)


def _draw_detector(axes: Axes, detector: str, shown: Sequence[tuple[str, DriftVerdict]]) -> None:
    places, effects, colours, unit, material, least = [], [], [], "", None, []
    for place, (_, verdict) in enumerate(shown):
        shift = next((s for s in verdict.shifts if s.detector == detector), None)
        if shift is None or shift.effect is None:
            continue
        places.append(place)
        effects.append(shift.effect)
        colours.append(_COLOURS[shift.status])
        unit, material = shift.effect_unit, shift.material_effect
        least.append(shift.smallest_shown)
    axes.bar(places, effects, color=colours, width=0.7)
    if material is not None:
        axes.axhline(material, color="#1c2430", linestyle="--", linewidth=1)
    for place, value in zip(places, least, strict=True):
        if value is not None:
            axes.plot([place - 0.35, place + 0.35], [value, value], color="#9aa4b1", linewidth=2)
    axes.set_title(detector.replace("_", " "), fontsize=9)
    axes.set_ylabel(unit)
    axes.set_xticks(places, [f"{place + 1}" for place in places])


def _before_after(story: Mapping[str, Any]) -> Markup | None:
    """Accuracy on shifted pictures that were never labelled, before and after, and on clean ones."""
    from matplotlib import pyplot

    if "switch" not in story:
        return None
    rows = [
        ("clean, before", story["clean"]["answers"]["accuracy"]),
        ("clean, after", story["switch"]["clean_after"]["accuracy"]),
        ("shifted, before", story["shifted"]["before"]["accuracy"]),
        ("shifted, after", story["switch"]["after"]["accuracy"]),
    ]
    figure, axes = pyplot.subplots(figsize=(7, 2.2))
    for place, (_, e) in enumerate(reversed(rows)):
        error = [[e["value"] - e["low"]], [e["high"] - e["value"]]]
        axes.errorbar(e["value"], place, xerr=error, fmt="o", color="#2563a8", capsize=4)
        axes.annotate(f"{e['value']:.3f}", (e["value"], place), textcoords="offset points", xytext=(0, 7), ha="center")
    axes.set_yticks(range(len(rows)), [f"{name} (n={e['n']})" for name, e in reversed(rows)])
    axes.set_xlabel("accuracy, 95 % interval")
    axes.margins(y=0.25)
    axes.grid(axis="x", color="#eceff3")
    return figures.as_svg(figure)


def _told(story: Mapping[str, Any]) -> list[str]:
    """The demo in sentences."""
    lines = []
    if "live" in story:
        lines.append(f"Version {story['live']['version']} was approved by {story['live']['approved_by']} and went live.")
    if "clean" in story:
        found = story["clean"]["verdict"]
        lines.append(f"Clean traffic ({counted(found['window']['rows'], 'prediction')}): {found['status']}.")
    if "shifted" in story:
        found = story["shifted"]["verdict"]
        lines.append(
            f"Shifted traffic ({counted(found['window']['rows'], 'prediction')}): {found['status']}, {found['diagnosis']}."
        )
    if "labels" in story:
        found = story["labels"]
        lines.append(
            f"{found['labels']} labels were spent; {found['added']} images joined the data, {found['joined_test']} of them "
            f"the frozen test split. The event woke the automation, and the run it made trained version "
            f"{found['version']}; from the event to the running training {found['alarm_to_running_s']} s."
        )
    if "switch" in story:
        found = story["switch"]
        lines.append(f"The champion changed under load: {found['requests']} requests, {found['failed']} failed.")
    if "camera" in story:
        lines.append(f"Black frames raised an alarm, and the governor refused: {story['camera']['reason']}.")
    return lines
