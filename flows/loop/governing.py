"""What the governor was asked and answered about a model's trainings, and a person's word to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from flows.loop.loop import Loop
from monitoring.governor import Granted, in_words
from monitoring.outbox import Alarm
from registry.approval import person

Switch = Literal["stop", "start", "reset"]


@dataclass(frozen=True)
class Answer:
    """One decision of the governor."""

    row: dict[str, Any]
    """As it is on record: seq, at, key, decision, rule, reason and more."""
    words: str
    """The decision with its rule and reason, for a person."""


@dataclass(frozen=True)
class AnsweredAlarm:
    """An alarm, and what the governor answered when it was asked for its training."""

    alarm: Alarm
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class GovernorHistory:
    """Decisions about trainings that no person started, and what became of them."""

    decisions: tuple[Answer, ...]
    runs: tuple[Granted, ...]
    stopped: str | None
    """Who switched the trainings off, and why; None while they are on."""


@dataclass(frozen=True)
class Switched:
    """A person's word to the governor that is on record."""

    model: str
    """`*` for all models."""
    kind: Switch
    by: str


def answered_alarms(loop: Loop, *, last: int | None = None) -> list[AnsweredAlarm]:
    """The alarms of a model, the first first, all or the last ones, each with the governor's answers."""
    alarms = loop.outbox.alarms(loop.model, last=last)
    answers: dict[str, list[Answer]] = {alarm.id: [] for alarm in alarms}
    for row in loop.governor.history(loop.model, keys=None if last is None else answers.keys()):
        if row["key"] in answers:
            answers[row["key"]].append(Answer(row, in_words(row)))
    return [AnsweredAlarm(alarm, tuple(answers[alarm.id])) for alarm in alarms]


def governor_history(loop: Loop, *, last: int | None = None) -> GovernorHistory:
    """What the governor decided about a model, all of it or the last decisions."""
    runs = tuple(loop.governor.runs(loop.model))
    decisions = tuple(Answer(row, in_words(row)) for row in loop.governor.history(loop.model, last=last))
    return GovernorHistory(decisions, runs, loop.governor.stopped(loop.model))


def switch(loop: Loop, kind: Switch, *, by: str, reason: str, every: bool = False) -> Switched:
    """Switch the trainings of a model off or on, or take its loop breaker back; of all models with `every`.

    Raises ConfigError for a name that names nobody or a reason that says nothing.
    """
    name, model = person(by).name, "*" if every else loop.model
    loop.governor.switch(kind, model, by=name, reason=reason)
    return Switched(model, kind, name)
