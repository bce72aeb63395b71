"""What waits for a person, model by model, and who is champion."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

from flows.console.application import Application
from flows.console.rendering import ago
from flows.workspace.versions import State, candidates, champion_of, is_fresh

_MOST = 100
"""Versions of a model that are listed, the newest first."""
_WAITING = ("undecided", "waiting", "approved", "expired")


@dataclass(frozen=True)
class Waiting:
    """One version in the queue."""

    version: str
    word: str
    """The verdict in a word or two."""
    badge: str
    sentence: str
    headline: str
    figure: dict[str, Any] | None
    champion_figure: dict[str, Any] | None
    asked_by: str
    at: str
    waits: str
    """How long it has been waiting."""
    next: str
    """What a person can do about it."""


@dataclass(frozen=True)
class Queue:
    """One model."""

    model: str
    champion: State | None
    champion_since: str
    waiting: tuple[Waiting, ...]
    num_more: int


def queue(application: Application, model: str, now: datetime.datetime) -> Queue:
    """What waits of a model, the newest first."""
    desk = application.desk(model)
    states = candidates(desk)
    waiting = [state for state in states if state.status in _WAITING][::-1]
    champion, moved = next((state for state in states if state.status == "champion"), None), champion_of(desk)
    return Queue(
        model=model,
        champion=champion,
        champion_since=moved.at if moved is not None else "",
        waiting=tuple(_waiting(state, is_fresh(state, moved), now) for state in waiting[:_MOST]),
        num_more=max(0, len(waiting) - _MOST),
    )


def _waiting(state: State, fresh: bool, now: datetime.datetime) -> Waiting:
    summary = state.requested.body.get("summary") or {}
    headline = summary.get("headline", "accuracy")
    evidence = summary.get("evidence") or {}
    since = state.decision.at if state.decision is not None else state.requested.at
    word, badge = status_word(state)
    return Waiting(
        version=state.version,
        word=word,
        badge=badge,
        sentence=evidence.get("sentence", ""),
        headline=headline.replace("_", " "),
        figure=summary.get("metrics", {}).get(headline),
        champion_figure=(summary.get("champion") or {}).get(headline),
        asked_by=state.requested.actor.name,
        at=state.requested.at,
        waits=ago(since, now),
        next=_next(state, fresh),
    )


def status_word(state: State) -> tuple[str, str]:
    """Where a version stands, in a word, and the kind of badge that it gets."""
    words = {
        "undecided": ("undecided", "unsure"),
        "waiting": ("passed every gate", "pass") if not state.undecided else ("excepted", "unsure"),
        "approved": ("approved", "pass"),
        "expired": ("approval expired", "unsure"),
        "rejected": ("rejected", "fail"),
        "champion": ("champion", "pass"),
        "retired": ("was champion", "idle"),
    }
    return words[state.status]


def _next(state: State, fresh: bool) -> str:
    if not fresh:
        return "train again: it was not compared with today's champion"
    return {
        "undecided": f"more evidence, or an exception for {', '.join(state.missing)}",
        "waiting": "approve or reject",
        "approved": "promote",
        "expired": "approve again or reject",
    }[state.status]
