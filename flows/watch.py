"""The map of watching: windows of served predictions -> verdicts -> durable alarms -> events, and the sweep behind them."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

from prefect import flow, task

from flows.alarming import Started, announce, sweep
from flows.looping import Loop
from flows.steps import REGISTRY_POLICY
from flows.watching import Judged, Stretch, Told, expect_reigning, judge_window, open_loop, stretches
from monitoring.drift import as_json


@task(name="judging", **REGISTRY_POLICY)
def judging(loop: Loop, stretch: Stretch, now: datetime.datetime) -> Judged | None:
    """One window: what the log holds, against the champion's reference. Its alarm is a row when this returns."""
    return judge_window(loop, stretch, now)


@task(name="announcing", **REGISTRY_POLICY)
def announcing(loop: Loop, judged: Judged, told: Told) -> None:
    """The event and the notification of a new alarm."""
    if judged.alarm is not None:
        announce(loop, judged.alarm, told=told)


@task(name="sweeping", **REGISTRY_POLICY)
def sweeping(loop: Loop, told: Told, grace_s: float | None) -> list[Started]:
    """What was alarmed, killed or queued and is still waiting for its training."""
    return sweep(loop, told=told, grace_s=grace_s)


@flow(name="watch", validate_parameters=False)
def watch(
    model: str | None = None,
    workspace: str = ".",
    minutes: float | None = None,
    since: str | None = None,
    until: str | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Judge the windows that ended and were not judged yet; returns their verdicts as JSON data.

    Instead of those, the last `minutes`, or what lies between two moments (ISO 8601).
    """

    def told(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    loop = open_loop(Path(workspace), model)
    now = datetime.datetime.now(datetime.UTC)
    found = []
    for stretch in stretches(loop, now, minutes=minutes, since=since, until=until):
        judged = judging(loop, stretch, now)
        if judged is None:
            continue
        announcing(loop, judged, told)
        if judged.problem:
            told(f"note: {judged.problem}")
        found.append(judged)
    expect_reigning(loop, found)
    started = sweeping(loop, told, None)
    return {
        "model": loop.model,
        "windows": [{"id": j.window, "judged_now": j.fresh, "folder": str(j.folder), **as_json(j.verdict)} for j in found],
        "alarms": [j.alarm.id for j in found if j.alarm is not None],
        "started": [{"key": s.key, "flow_run": s.flow_run_id} for s in started],
    }
