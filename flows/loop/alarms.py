"""From a durable alarm to a training: the event that wakes the automation, and the sweep that does not need it.

An event may be lost, late or doubled; the alarm's row is what counts. What the sweep starts and what the automation starts
ask the same governor, which grants each alarm once.
"""

from __future__ import annotations

import threading

from components import dataversions
from components.contracts.errors import DataError
from components.contracts.wording import counted
from flows.loop.flow_runs import TIMEOUT_S, Started, start, training_parameters
from flows.loop.loop import Loop
from flows.orchestrator import events
from flows.orchestrator.notifications import notify
from flows.terminal import Say
from monitoring.outbox import Alarm

DRIFT = "visionloop.drift.detected"
DATA = "visionloop.data.added"


def emit(loop: Loop, event: str, alarm: Alarm) -> bool:
    """Send the event that starts the training deployment; False when there is no server. Raises what `events.emit` does."""
    if not loop.settings.prefect_api_url:
        return False
    payload = {
        "alarm": alarm.id,
        "window": alarm.window,
        "diagnosis": alarm.diagnosis,
        "detectors": ", ".join(alarm.detectors),
        "reason": f"drift in window {alarm.window}: {', '.join(alarm.detectors)}",
    }
    events.emit(loop.settings, event, loop.model, payload)
    return True


def announce(loop: Loop, alarm: Alarm, *, say: Say) -> None:
    """Tell the automation and people about a new alarm; what fails is told, and found again by the sweep."""
    try:
        if emit(loop, DRIFT, alarm):
            loop.outbox.emitted(alarm)
    except Exception as error:
        # Prefect's client and its transports share no base class; the row stays, and the sweep finds it.
        say(f"note: the event was not sent ({type(error).__name__}: {str(error)[:120]}); the sweep will find the alarm")
    if loop.outbox.first_of_its_kind(alarm):
        facts = {"version": alarm.version, "by": ", ".join(alarm.detectors), "reason": "; ".join(alarm.reasons)}
        notify(loop.settings, "drift", loop.model, facts, say=say)


def pending(loop: Loop, *, grace_s: float | None = None) -> list[str]:
    """Keys that a training should be asked for now: forgotten alarms, killed runs, what waited for a place or for data."""
    grace = loop.config.sweep_after_s if grace_s is None else grace_s
    forgotten = [alarm.id for alarm in loop.outbox.waiting(loop.model, grace_s=grace)]
    keys = [*forgotten, *loop.governor.due(loop.model), *awaiting_data(loop)]
    return list(dict.fromkeys(keys))


def awaiting_data(loop: Loop) -> list[str]:
    """The newest alarm that was refused for want of new data, once there are new data."""
    try:
        version = dataversions.pinned(loop.workspace.root).dvc_hash
    except DataError:
        return []
    return loop.governor.awaiting_data(loop.model, version)


def tell_of_data(loop: Loop, *, say: Say) -> list[str]:
    """Raise the alarm that waited for data again, now that there are new ones; returns the keys that were told."""
    woken = []
    for key in awaiting_data(loop):
        try:
            if emit(loop, DATA, loop.outbox.alarm(key)):
                woken.append(key)
        except Exception as error:
            # As in `announce`: the sweep finds it.
            say(f"note: the event was not sent ({type(error).__name__}: {str(error)[:120]}); the sweep will find the alarm")
    return woken


def sweep(loop: Loop, *, say: Say, grace_s: float | None = None) -> list[Started]:
    """Start what nobody started, through the training deployment; running again starts nothing twice.

    Raises nothing for a Prefect server that is away: what is pending stays pending, and that is told. Raises ConfigError
    when nobody can say by which recipe it is trained.
    """
    keys = pending(loop, grace_s=grace_s)
    if not keys:
        return []
    if not loop.settings.prefect_api_url:
        say(f"{counted(len(keys), 'training')} to start ({keys[0]}), and no Prefect server is known here: visionloop up")
        return []
    training_parameters(loop)  # a recipe that is not there is no fault of Prefect's
    started: list[Started] = []
    problem: list[str] = []

    def start_all() -> None:
        try:
            for key in keys:
                if not _cancelled(loop, key) and (run := start(loop, key)) is not None:
                    started.append(run)
        except Exception as error:
            # A server that is down, a deployment that is not there, a credential that is wrong.
            problem.append(f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}")

    # Prefect's client retries a server that is away for minutes; a sweep comes again soon enough.
    thread = threading.Thread(target=start_all, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    if thread.is_alive():
        problem.append("no answer in time")
    for found in problem:
        say(f"{counted(len(keys) - len(started), 'training')} not started by Prefect ({found}); the next sweep tries again")
    return started


def _cancelled(loop: Loop, key: str) -> bool:
    """Whether a person cancelled the run of this key in Prefect: then it stays ended."""
    if not any(run.key == key and run.state == "crashed" for run in loop.governor.runs(loop.model)):
        return False
    from flows.loop.flow_runs import training_runs

    made = training_runs(loop, request=key)
    if not made or made[-1]["state"] not in ("Cancelled", "Cancelling"):
        return False
    loop.governor.cancel(key)
    return True
