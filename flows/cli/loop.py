"""The loop on the command line: watch, label, and what runs by itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components.contracts.errors import ConfigError
from components.contracts.wording import counted, shown_utc
from flows.cli.answers import HERE, AsJson, By, Commands, InWorkspace, OfModel, Reason, finish, moment
from flows.terminal import figure

if TYPE_CHECKING:
    from flows.loop.governing import AnsweredAlarm, Switch
    from flows.loop.loop import Loop

labels_app = Commands(help="What people say about images of production.")
governor_app = Commands(help="What may train without a person, and what was decided.")


def add_loop_commands(app: Commands) -> None:
    """Put the loop's commands on the command line."""
    for command in (watch, windows, alarms, sweep, report):
        app.command()(command)
    app.add_typer(labels_app, name="labels")
    app.add_typer(governor_app, name="governor")


def _loop(workspace: Path, model: str | None) -> Loop:
    from flows.workspace.settings import prepare_environment
    from flows.workspace.workspace import Workspace

    # Before Prefect or Evidently is imported by anything.
    prepare_environment(Workspace.find(workspace).state)
    from flows.loop.windows import open_loop

    return open_loop(workspace, model)


def watch(
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Judge the last N minutes; by default every scheduled window that has ended and was not judged yet."
        ),
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="Judge from this moment on, ISO 8601, UTC unless it says otherwise.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Up to this moment; now by default.")] = None,
    model: OfModel = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Compare what the champion answered with its reference sample. Exit status 1 when a window drifted."""
    if minutes is not None and (since or until):
        raise ConfigError("give --minutes, or --since and --until, not both")
    begin = moment("--since", since, past=True) if since else None
    end = moment("--until", until) if until else None
    loop = _loop(workspace, model)
    from flows.starting import start_watch

    found = start_watch(loop, minutes=minutes, since=begin, until=end, quiet=json_)
    finish(found, json_, lambda: _shown_windows(found))
    if any(window["status"] == "drift" for window in found["windows"]):
        raise typer.Exit(1)


def _shown_windows(found: dict[str, Any]) -> str:
    from flows.loop.windows import PAGE, TO_LABEL

    lines = []
    for told in found["windows"]:
        lines.append(_line(told))
        lines += [f"    {reason}" for reason in told["reasons"]]
        if told["status"] == "drift":
            named = {"page": PAGE, "label": TO_LABEL}
            lines += [f"    {name:7} {told['folder']}/{file}" for name, file in named.items() if file in told["files"]]
    lines += [f"alarm {alarm}" for alarm in found["alarms"]]
    lines += [f"training of {run['key']} started: flow run {run['flow_run']}" for run in found["started"]]
    return "\n".join(lines) or f"{found['model']}: no window has ended since it has a champion"


def _line(told: dict[str, Any]) -> str:
    window = told["window"]
    kind = f" ({told['diagnosis']})" if told["diagnosis"] != "none" else ""
    span = f"{window['since'][:16]} to {window['until'][:16]} UTC"
    rows = f"version {window['version']}, {counted(window['rows'], 'prediction')}"
    return f"{told['status'].upper():13} {span}  {rows}{kind}  [{told['id']}]"


def windows(
    last: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    model: OfModel = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """What was found in the windows so far, and the accuracy that labels showed since."""
    from flows.loop.windows import past_windows

    loop = _loop(workspace, model)
    found = past_windows(loop, last)

    def text() -> str:
        lines = []
        for told in found:
            accuracy = told["realised_accuracy"]
            shown = f"  accuracy on labelled {figure(accuracy)}" if accuracy else ""
            lines.append(_line(told) + shown)
        return "\n".join(lines) or f"{loop.model}: no window was judged yet (visionloop watch)"

    finish({"model": loop.model, "windows": found}, json_, text)


def alarms(model: OfModel = None, workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """Alarms, and whether each was allowed to start a training (what the governor answered), and why."""
    from flows.loop.governing import answered_alarms

    loop = _loop(workspace, model)
    found = answered_alarms(loop)

    def text() -> str:
        lines = []
        for told in found:
            alarm = told.alarm
            lines.append(f"{shown_utc(alarm.at.isoformat())}  {alarm.id}: {alarm.diagnosis}, {', '.join(alarm.detectors)}")
            lines += [f"    {shown_utc(answer.row['at'])}  {answer.words}" for answer in told.answers]
            lines += (
                []
                if told.answers
                else ["    the governor was not asked yet: a later alarm covers it, or the next sweep asks"]
            )
        return "\n".join(lines) or f"{loop.model}: no alarm so far"

    finish({"model": loop.model, "alarms": [_alarm_json(told) for told in found]}, json_, text)


def _alarm_json(told: AnsweredAlarm) -> dict[str, Any]:
    return {
        "alarm": told.alarm.id,
        "at": told.alarm.at.isoformat(),
        "version": told.alarm.version,
        "detectors": list(told.alarm.detectors),
        "diagnosis": told.alarm.diagnosis,
        "emissions": told.alarm.emissions,
        "answers": [{k: answer.row[k] for k in ("seq", "at", "decision", "rule", "reason")} for answer in told.answers],
    }


def sweep(model: OfModel = None, workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """Start trainings that should have started and did not: whose event was lost, which were killed or waited for data.

    Without --model, of every model. Exit status 1 when a model's loop or recipe is not valid; the others are swept.
    """
    from flows.workspace.settings import prepare_environment
    from flows.workspace.workspace import Workspace

    found = Workspace.find(workspace)
    prepare_environment(found.state)
    from flows.up.sweeping import sweep_models

    swept = sweep_models(found, model)
    started = [{"model": of, "key": run.key, "flow_run": run.flow_run_id} for of, run in swept.started]
    lines = [f"{s['model']}: {s['key']}: flow run {s['flow_run']}" for s in started] + list(swept.notes)
    lines = lines or [f"{', '.join(swept.models) or 'no model'}: nothing waits"]
    lines += [f"problem: {problem}" for problem in swept.problems]
    answer = {
        "models": list(swept.models),
        "started": started,
        "notes": list(swept.notes),
        "problems": list(swept.problems),
    }
    finish(answer, json_, lambda: "\n".join(lines))
    if swept.problems:
        raise typer.Exit(1)


def report(
    out: Annotated[Path | None, typer.Option("--out", help="File to write; .visionloop/loop-MODEL.html by default.")] = None,
    model: OfModel = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Draw the page of the loop: versions, windows, alarms, decisions, labels, and when each of it happened."""
    loop = _loop(workspace, model)
    from flows.loop.report import write_loop_report
    from flows.up.processes import Up

    place = out or loop.workspace.state / f"loop-{loop.model}.html"
    written = write_loop_report(loop, place.resolve(), pages=Up(loop.workspace, loop.settings).addresses())
    finish({"model": loop.model, "report": str(written)}, json_, lambda: f"Report: {written}")


@labels_app.command("import")
def labels_import(
    file: Annotated[Path, typer.Argument(help=".csv, .jsonl or .parquet with prediction_id or image_sha256, and label.")],
    as_: Annotated[str | None, typer.Option("--as", help="Who labelled, where the file does not say it.")] = None,
    skip_unknown: Annotated[bool, typer.Option(help="Leave out rows that name nothing the log knows.")] = False,
    new_classes: Annotated[bool, typer.Option(help="Accept names that are no class of the model yet.")] = False,
    model: OfModel = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Take labels of images of production, whole or not at all. The newest label of an image counts."""
    from flows.loop.labels import import_labels

    loop = _loop(workspace, model)
    taken = import_labels(loop, file, by=as_, skip_unknown=skip_unknown, new_classes=new_classes)
    done, unknown = taken.imported, taken.unknown
    answer = {
        "model": loop.model,
        "new": done.new,
        "known": done.known,
        "changed": done.changed,
        "without_label": done.skipped,
        "unknown": unknown,
        "labelled_images": taken.labelled_images,
    }
    notes = [
        f"{done.known} were there already" if done.known else "",
        f"{counted(done.changed, 'image')} had another label before" if done.changed else "",
        f"{counted(done.skipped, 'row')} had no label" if done.skipped else "",
        f"{counted(unknown, 'row')} left out: nothing in the log is named so" if unknown else "",
    ]
    finish(
        answer,
        json_,
        lambda: (
            f"{counted(done.new, 'label')} of {loop.model} imported ({'; '.join(filter(None, notes)) or 'all new'}).\n"
            f"Next: visionloop data add --from-predictions {loop.model}"
        ),
    )


@labels_app.command("list")
def labels_list(model: OfModel = None, workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """The labels that count, by class."""
    from flows.loop.labels import count_labels

    loop = _loop(workspace, model)
    found = count_labels(loop)
    lines = [f"{name:24} {count}" for name, count in found.classes.items()]
    lines += [f"by {who}: {count}" for who, count in found.labelled_by.items()]
    answer = {
        "model": loop.model,
        "images": found.images,
        "classes": found.classes,
        "labelled_by": found.labelled_by,
    }
    finish(answer, json_, lambda: "\n".join(lines) or f"{loop.model}: no label so far")


@governor_app.command("history")
def governor_history(model: OfModel = None, workspace: InWorkspace = HERE, json_: AsJson = False) -> None:
    """Every decision about a training that no person started, with its rule and reason, and what became of it."""
    from flows.loop.governing import governor_history as told

    loop = _loop(workspace, model)
    found = told(loop)
    runs = [
        {
            "key": run.key,
            "cause": run.cause,
            "granted_at": run.granted_at.isoformat(),
            "attempts": run.attempts,
            "state": run.state,
            "outcome": run.outcome,
            "version": run.body.get("version"),
        }
        for run in found.runs
    ]
    lines = [f"{d.row['seq']:>5}  {shown_utc(d.row['at'])}  {d.row['key']}  {d.words}" for d in found.decisions]
    lines += [f"run {r['key']}: {r['state']}, {r['outcome'] or 'no outcome yet'}, attempt {r['attempts']}" for r in runs]
    decisions = [decision.row for decision in found.decisions]
    answer = {"model": loop.model, "decisions": decisions, "runs": runs, "stopped": found.stopped}
    finish(answer, json_, lambda: "\n".join(lines) or f"{loop.model}: nothing was asked of the governor so far")


def _switch(kind: Switch, as_: str, reason: str, every: bool, model: str | None, workspace: Path, json_: bool) -> None:
    from flows.loop.governing import switch

    loop = _loop(workspace, model)
    done = switch(loop, kind, by=as_, reason=reason, every=every)
    words = {
        "stop": "start no training by themselves any more",
        "start": "may start trainings again",
        "reset": "may go on after a training that did not help",
    }[kind]
    shown = "all models" if every else loop.model
    answer = {"model": done.model, "kind": done.kind, "by": done.by}
    finish(answer, json_, lambda: f"Drift and schedule of {shown} {words} ({done.by}).")


Every = Annotated[bool, typer.Option("--all", help="Of every model.")]


@governor_app.command("stop")
def governor_stop(
    as_: By,
    reason: Reason,
    every: Every = False,
    model: OfModel = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """The kill switch: nothing trains any more unless a person starts it."""
    _switch("stop", as_, reason, every, model, workspace, json_)


@governor_app.command("start")
def governor_start(
    as_: By,
    reason: Reason,
    every: Every = False,
    model: OfModel = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Take the kill switch back."""
    _switch("start", as_, reason, every, model, workspace, json_)


@governor_app.command("reset")
def governor_reset(
    as_: By,
    reason: Reason,
    every: Every = False,
    model: OfModel = None,
    workspace: InWorkspace = HERE,
    json_: AsJson = False,
) -> None:
    """Let the loop go on after a retraining that did not help."""
    _switch("reset", as_, reason, every, model, workspace, json_)
