"""What a page shows of a model in production: one look at its champion, traffic, windows, alarms, governor and labels."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from components.contracts.errors import ConfigError
from flows.loop.alarms import pending
from flows.loop.governing import Answer, AnsweredAlarm, answered_alarms, governor_history
from flows.loop.labelling import Asked, count_asked
from flows.loop.labels import LabelsCounted, count_labels
from flows.loop.loop import Loop
from flows.loop.traffic import Traffic, traffic_of
from flows.loop.windows import realised_accuracies, windows
from monitoring.governor import Granted
from monitoring.verdicts import DriftVerdict
from registry import approval

_WINDOWS = 30
_DECISIONS = 30
_ALARMS = 30


@dataclass(frozen=True)
class Champion:
    """The version that is served now."""

    version: str
    release: str
    """Digest of its release."""
    since: datetime.datetime
    by: str
    rolled_back: bool
    """Whether it is champion again because somebody went back to it."""


@dataclass(frozen=True)
class SeenWindow:
    """A judged window, and what labels showed of it since."""

    name: str
    verdict: DriftVerdict
    accuracy: dict[str, float | int] | None
    """Share of its labelled images that were answered right, as `estimate_json` gives it; None while none is labelled."""

    @property
    def status(self) -> str:
        return self.verdict.status


@dataclass(frozen=True)
class Overview:
    """One look at a model in production; what is listed is in order of time."""

    model: str
    at: datetime.datetime
    champion: Champion | None
    traffic: Traffic
    windows: tuple[SeenWindow, ...]
    """The last 30."""
    open_alarms: tuple[AnsweredAlarm, ...]
    """Alarms about the champion since a window of it passed last, with the governor's answers: at most the last 30."""
    decisions: tuple[Answer, ...]
    """The governor's last 30."""
    stopped: str | None
    """Who switched the trainings off, and why; None while they are on."""
    waiting: tuple[str, ...]
    """What a training should be asked for now: alarms and runs that the next sweep takes up."""
    runs: tuple[Granted, ...]
    """Trainings that no person started and that say that they live."""
    labels: LabelsCounted
    asked: Asked
    """The pictures whose labels are asked for."""
    problems: tuple[str, ...]
    """What cannot be told, and why."""


def overview(loop: Loop, now: datetime.datetime | None = None) -> Overview:
    """What there is to see of a model now; raises RegistryUnavailable for a database or a store that is away."""
    now = now or datetime.datetime.now(datetime.UTC)
    champion, judged, told = _champion(loop), windows(loop, _WINDOWS), governor_history(loop, last=_DECISIONS)
    accuracies = realised_accuracies(loop, judged)
    waiting, problems = _waiting(loop)
    return Overview(
        model=loop.model,
        at=now,
        champion=champion,
        traffic=traffic_of(loop, now),
        windows=tuple(SeenWindow(name, verdict, accuracies[name]) for name, verdict in judged),
        open_alarms=_open_alarms(loop, champion, judged),
        decisions=told.decisions,
        stopped=told.stopped,
        waiting=waiting,
        runs=tuple(run for run in told.runs if run.state == "running"),
        labels=count_labels(loop),
        asked=count_asked(loop),
        problems=problems,
    )


def _champion(loop: Loop) -> Champion | None:
    entry = approval.champion(loop.ledger.entries(loop.model))
    if entry is None:
        return None
    since = datetime.datetime.fromisoformat(entry.at)
    return Champion(str(entry.body["version"]), entry.body["release"], since, entry.actor.name, entry.kind == "rolled_back")


def _open_alarms(
    loop: Loop, champion: Champion | None, judged: Sequence[tuple[str, DriftVerdict]]
) -> tuple[AnsweredAlarm, ...]:
    """Those of the champion's release that no later window of it speaks against."""
    if champion is None:
        return ()
    passed = [name for name, v in judged if (v.status, v.window.release) == ("pass", champion.release)]
    found = answered_alarms(loop, last=_ALARMS)
    # Names of windows begin with the time.
    return tuple(
        told for told in found if told.alarm.release == champion.release and told.alarm.window > max(passed, default="")
    )


def _waiting(loop: Loop) -> tuple[tuple[str, ...], tuple[str, ...]]:
    try:
        return tuple(pending(loop)), ()
    except ConfigError as error:
        return (), (f"what waits for a training cannot be told: {error}",)
