"""The map of watching: windows of served predictions -> verdicts -> durable alarms -> events, and the sweep behind them."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.states import Completed

from components.contracts.errors import RegistryUnavailable, VisionloopError
from components.contracts.wording import counted
from flows.loop.alarms import announce, sweep
from flows.loop.flow_runs import Started
from flows.loop.loop import Loop
from flows.loop.permits import overdue
from flows.loop.windows import JudgedWindow, Span, expect_champion, judge_window, open_loop, prune, stretches
from flows.orchestrator.notifications import notify
from flows.orchestrator.retries import REGISTRY_POLICY
from flows.terminal import Say, silent, to_stderr
from flows.workspace.settings import read_settings
from flows.workspace.workspace import Workspace
from monitoring.drift import as_json


@task(name="judging", **REGISTRY_POLICY)
def judging(loop: Loop, stretch: Span, now: datetime.datetime) -> JudgedWindow | None:
    """One window: what the log holds, against the champion's reference. Its alarm is a row when this returns."""
    return judge_window(loop, stretch, now)


@task(name="announcing", **REGISTRY_POLICY)
def announcing(loop: Loop, judged: JudgedWindow, say: Say) -> None:
    """The event and the notification of a new alarm."""
    if judged.alarm is not None:
        announce(loop, judged.alarm, say=say)


@task(name="sweeping", **REGISTRY_POLICY)
def sweeping(loop: Loop, say: Say, grace_s: float | None) -> list[Started]:
    """What was alarmed, killed or queued and is still waiting for its training."""
    return sweep(loop, say=say, grace_s=grace_s)


@flow(name="watch", validate_parameters=False)
def watch(
    model: str | None = None,
    workspace: str = ".",
    minutes: float | None = None,
    since: str | None = None,
    until: str | None = None,
    quiet: bool = True,
) -> Any:
    """Judge the windows that ended and were not judged yet; returns their verdicts as JSON data.

    Instead of those, the last `minutes`, or what lies between two moments (ISO 8601).
    """
    say = silent if quiet else to_stderr
    try:
        loop = open_loop(Path(workspace), model)
    except RegistryUnavailable as error:
        settings = read_settings(Workspace.find(Path(workspace)).state)
        notify(settings, "unwatched", model or "a model", {"by": "visionloop watch", "reason": str(error)}, say=say)
        raise
    now = datetime.datetime.now(datetime.UTC)
    scheduled = minutes is None and since is None and until is None
    if scheduled and (why := overdue(datetime.timedelta(minutes=loop.config.every_minutes))):
        told_late = {"model": loop.model, "windows": [], "alarms": [], "started": [], "skipped": why}
        return Completed(name="Skipped", message=why, data=told_late)
    found, problems = [], []
    for stretch in stretches(loop, now, minutes=minutes, since=since, until=until):
        try:
            judged = judging(loop, stretch, now)
        except VisionloopError as error:
            # One release or segment that is damaged must not hide the windows after it, nor stop the sweep.
            problems.append(error)
            say(f"the window until {stretch.until:%Y-%m-%d %H:%M} could not be judged: {error}")
            continue
        if judged is None:
            continue
        announcing(loop, judged, say)
        if judged.problem:
            say(f"note: {judged.problem}")
        found.append(judged)
    started: list[Started] = []
    try:
        started = sweeping(loop, say, None)
    except VisionloopError as error:
        problems.append(error)
    if problems:
        facts = {"by": "visionloop watch", "reason": f"{counted(len(problems), 'problem')}, the last: {problems[-1]}"}
        notify(loop.settings, "unwatched", loop.model, facts, say=say)
        raise problems[-1]
    expect_champion(loop, found)
    prune(loop, now)
    return {
        "model": loop.model,
        "windows": [
            {"id": j.window, "judged_now": j.fresh, "folder": j.place, "files": list(j.files), **as_json(j.verdict)}
            for j in found
        ],
        "alarms": [j.alarm.id for j in found if j.alarm is not None],
        "started": [{"key": s.key, "flow_run": s.flow_run_id} for s in started],
    }
