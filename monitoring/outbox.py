"""The outbox: an alarm is a durable row before anybody is told of it.

One row a model, window and detector, whatever is judged again. Events are wake-ups: they may be lost, doubled, late or
forged. Rows that nobody has acted on are found by `waiting`, and who acts asks the governor, which grants each once.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from components.contracts.errors import UnknownName
from components.contracts.records import canonical_json, sha256_text
from components.databases import Database, now
from monitoring.records import alarms, decisions
from monitoring.verdicts import DriftVerdict

_EPISODE = datetime.timedelta(hours=24)
"""Drift that goes on is told again after this long."""


@dataclass(frozen=True)
class Alarm:
    """All rows of one window: what is acted on together."""

    id: str
    """Names the alarm in events and to the governor."""
    seq: int
    """Alarms are in the order of their numbers; clocks may be set back."""
    model: str
    window: str
    at: datetime.datetime
    detectors: tuple[str, ...]
    diagnosis: str
    reasons: tuple[str, ...]
    version: str
    release: str
    emitted_at: datetime.datetime | None
    emissions: int


def window_id(model: str, since: str, until: str, release: str) -> str:
    """Names a window of a release; equal for every time it is judged."""
    return f"{since[:16].replace(':', '')}Z-{sha256_text(canonical_json([model, since, until, release]))[:10]}"


def alarm_id(model: str, window: str) -> str:
    """Names the alarm about a window."""
    return f"drift:{model}:{window}"


class Outbox:
    """Alarms of every model behind one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def raise_alarm(self, verdict: DriftVerdict, window: str) -> tuple[Alarm, bool]:
        """Make the alarm durable; True when it is new. Raises ValueError for a verdict that is no drift."""
        if verdict.status != "drift":
            raise ValueError(f"a window that is {verdict.status!r} raises no alarm")
        model = verdict.window.model
        body = {
            "alarm": alarm_id(model, window),
            "detectors": list(verdict.detectors),
            "diagnosis": verdict.diagnosis,
            "reasons": list(verdict.reasons),
            "version": verdict.window.version,
            "release": verdict.window.release,
            "verdict": verdict.digest(),
        }
        new = False
        with self._database.transaction() as connection:
            at = now(connection).isoformat(timespec="microseconds")
            for detector in verdict.detectors:
                key = f"{model}:{window}:{detector}"
                if connection.execute(sa.select(alarms.c.key).where(alarms.c.key == key)).first() is None:
                    new = True
                    row = {"key": key, "at": at, "model": model, "window": window, "detector": detector}
                    connection.execute(alarms.insert().values(**row, body=canonical_json(body), emissions=0))
            found = _alarms(connection, alarms.c.model == model, alarms.c.window == window)
        return found[0], new

    def emitted(self, alarm: Alarm) -> None:
        """Note that an event was sent; not that anybody received it."""
        with self._database.transaction() as connection:
            mine = (alarms.c.model == alarm.model) & (alarms.c.window == alarm.window)
            at = now(connection).isoformat(timespec="microseconds")
            connection.execute(alarms.update().where(mine).values(emitted_at=at, emissions=alarms.c.emissions + 1))

    def alarm(self, identifier: str) -> Alarm:
        """The alarm of this id; raises UnknownName: an event that names another one was not made by us."""
        with self._database.transaction() as connection:
            known = {found.id: found for found in _alarms(connection)}
        if identifier not in known:
            raise UnknownName("alarm", identifier[:200], list(known)[-5:])
        return known[identifier]

    def alarms(self, model: str | None = None, *, last: int | None = None) -> list[Alarm]:
        """Alarms in order of time, all of them or the `last` ones."""
        mine = [alarms.c.model == model] if model is not None else []
        if last is not None:
            first = sa.func.min(alarms.c.seq)
            named = sa.select(alarms.c.model, alarms.c.window).where(*mine).group_by(alarms.c.model, alarms.c.window)
            mine = [sa.tuple_(alarms.c.model, alarms.c.window).in_(named.order_by(first.desc()).limit(last))]
        with self._database.transaction() as connection:
            return _alarms(connection, *mine)

    def waiting(self, model: str, *, grace_s: float) -> list[Alarm]:
        """Alarms that are older than `grace_s` and that the governor was never asked about: their event was lost.

        Of several of one version that saw the same kind of drift the newest speaks for all, also when it was asked about.
        """
        with self._database.transaction() as connection:
            asked = {row.key for row in connection.execute(sa.select(decisions.c.key).distinct())}
            oldest = now(connection) - datetime.timedelta(seconds=grace_s)
            found = _alarms(connection, alarms.c.model == model)
        newest = {(alarm.version, alarm.diagnosis): alarm for alarm in found}
        return [
            alarm
            for alarm in found
            if alarm.id not in asked
            and newest[alarm.version, alarm.diagnosis] is alarm
            and (alarm.emitted_at or alarm.at) <= oldest
        ]

    def first_of_its_kind(self, alarm: Alarm) -> bool:
        """Whether the window before it did not alarm alike: people are told of an episode once."""
        alike = [
            other
            for other in self.alarms(alarm.model)
            if (other.version, other.diagnosis) == (alarm.version, alarm.diagnosis) and other.seq < alarm.seq
        ]
        return not alike or alarm.at - alike[-1].at > _EPISODE


def _alarms(connection: sa.Connection, *conditions: Any) -> list[Alarm]:
    rows: Sequence[Any] = connection.execute(sa.select(alarms).where(*conditions).order_by(alarms.c.seq)).fetchall()
    grouped: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        grouped.setdefault((row.model, row.window), []).append(row)
    found = []
    for (model, window), members in grouped.items():
        body = json.loads(members[0].body)
        told = [datetime.datetime.fromisoformat(row.emitted_at) for row in members if row.emitted_at]
        found.append(
            Alarm(
                id=alarm_id(model, window),
                seq=members[0].seq,
                model=model,
                window=window,
                at=datetime.datetime.fromisoformat(members[0].at),
                detectors=tuple(sorted(row.detector for row in members)),
                diagnosis=body["diagnosis"],
                reasons=tuple(body["reasons"]),
                version=body["version"],
                release=body["release"],
                emitted_at=max(told) if told else None,
                emissions=max(row.emissions for row in members),
            )
        )
    return found
