"""The governor: whether an alarm or a schedule may start a training now. Every answer is a row with its reason.

The rules are one pure function of what is known (`decide`); `Governor.ask` calls it inside the transaction that writes the
answer, so a hundred deliveries of one alarm end in one grant. A grant is a lease that its holder renews: a run that was
killed stops renewing, and may be taken up once more.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import sqlalchemy as sa
from pydantic import Field

from components.contracts.errors import ConfigError
from components.contracts.records import Record, canonical_json
from components.contracts.wording import counted
from components.databases import Database, now
from monitoring.records import decisions, runs, switches

MachineCause = Literal["drift", "schedule"]
Answer = Literal["granted", "queued", "refused"]
Rule = Literal[
    "granted",
    "resumed",
    "duplicate",
    "given up",
    "kill switch",
    "overdue",
    "stale",
    "broken input",
    "no new data",
    "nothing changed",
    "loop breaker",
    "single flight",
    "cool-down",
    "budget",
]
RunState = Literal["running", "finished", "crashed"]
Outcome = Literal["candidate", "rejection", "failed"]


class GovernorPolicy(Record):
    """Bounds of what happens without a person."""

    cooldown_h: float = Field(default=6.0, ge=0)
    """Between the starts of two trainings that drift asked for."""
    max_per_day: int = Field(default=4, ge=1)
    """Trainings that drift or a schedule may start in 24 hours."""
    lease_s: float = Field(default=60.0, ge=1)
    """A run that did not say it lives for so long is taken for dead."""
    max_attempts: int = Field(default=2, ge=1, le=5)
    """A run that was killed is taken up again this often, the first start included."""


@dataclass(frozen=True)
class Request:
    """What wants to train, and what is known about it."""

    key: str
    """Alarm id, or a name of the scheduled run; one key is granted once."""
    model: str
    cause: MachineCause
    data_version: str
    """What would be trained on."""
    trained_on: str | None
    """Data version of the latest run of this model; None when there was none."""
    changed: bool = True
    """Whether data, recipe or code differ from the latest run's."""
    diagnosis: str = "none"
    detectors: tuple[str, ...] = ()
    seen_by: str = ""
    """Version that the alarm is about."""
    champion: str = ""
    """Version that is champion now."""
    failed_versions: frozenset[str] = frozenset()
    """Versions that a person rejected or rolled back."""
    overdue: str = ""
    """Why a scheduled run comes too late to be worth anything; empty when it does not."""


@dataclass(frozen=True)
class Granted:
    """A run that was granted."""

    key: str
    cause: MachineCause
    granted_at: datetime.datetime
    attempts: int
    state: RunState
    lease_until: datetime.datetime
    data_version: str
    outcome: Outcome | None
    ended_at: datetime.datetime | None
    body: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """Everything the rules look at, of one model, in order of time."""

    runs: Sequence[Granted]
    queued: Sequence[str]
    stopped: str | None
    """Who threw the kill switch, and why; None while it is off."""
    reset_at: datetime.datetime | None
    """When a person last said that the loop may go on."""


@dataclass(frozen=True)
class Decision:
    """What the governor answered."""

    answer: Answer
    rule: Rule
    reason: str
    seq: int = 0
    at: datetime.datetime | None = None


def decide(request: Request, known: Known, policy: GovernorPolicy, at: datetime.datetime) -> Decision:
    """The rules, in the order in which they speak."""
    mine = next((run for run in known.runs if run.key == request.key), None)
    if mine is not None and mine.state != "crashed":
        was = f"is running since {_shown(mine.granted_at)}" if mine.state == "running" else f"ended as {mine.outcome}"
        return Decision("refused", "duplicate", f"this request was granted before, and its run {was}")
    if mine is not None and mine.attempts >= policy.max_attempts:
        return Decision(
            "refused",
            "given up",
            f"its run was killed {counted(mine.attempts, 'time')}; look at its log and train by hand",
        )
    if known.stopped is not None:
        return Decision("refused", "kill switch", f"trainings are switched off by {known.stopped}")
    active = next((run for run in known.runs if run.state == "running"), None)
    if mine is not None:
        if active is not None:
            return _queue(request, known, active)
        return Decision("granted", "resumed", f"its run was killed; attempt {mine.attempts + 1} of {policy.max_attempts}")
    refused = _drift(request, known) if request.cause == "drift" else _schedule(request)
    if refused is not None:
        return refused
    if active is not None:
        return _queue(request, known, active)
    if request.cause == "drift":
        last = max((run.granted_at for run in known.runs if run.cause == "drift"), default=None)
        if last is not None and at < (until := last + datetime.timedelta(hours=policy.cooldown_h)):
            return Decision(
                "refused", "cool-down", f"drift started a training at {_shown(last)}; not again before {_shown(until)}"
            )
    day = [run for run in known.runs if run.granted_at > at - datetime.timedelta(days=1)]
    if len(day) >= policy.max_per_day:
        return Decision(
            "refused", "budget", f"{counted(len(day), 'training')} started in 24 hours, allowed: {policy.max_per_day}"
        )
    return Decision("granted", "granted", "no rule forbids it")


def in_words(row: Mapping[str, Any]) -> str:
    """A decision with the rule that it rests on and its reason; a plain grant rests on none."""
    rule = "" if row["rule"] == row["decision"] else f" ({row['rule']})"
    return f"{row['decision']}{rule}: {row['reason']}"


def _queue(request: Request, known: Known, active: Granted) -> Decision:
    others = [key for key in known.queued if key != request.key]
    if others:
        return Decision(
            "refused", "single flight", f"{active.key} is being trained and {others[0]} waits; no more than one may wait"
        )
    return Decision("queued", "single flight", f"{active.key} is being trained; this one is next")


def _drift(request: Request, known: Known) -> Decision | None:
    if request.seen_by != request.champion:
        return Decision(
            "refused",
            "stale",
            f"the alarm is about version {request.seen_by}, but version {request.champion} is champion now",
        )
    if request.diagnosis == "broken input":
        return Decision("refused", "broken input", "the pictures show nothing to learn from: look at the camera")
    if request.trained_on is not None and request.data_version == request.trained_on:
        return Decision(
            "refused",
            "no new data",
            f"data version {request.data_version[:12]} was trained on already; label images of the window "
            f"(to-label.csv), import them, and add them (visionloop data add --from-predictions)",
        )
    ended = [run for run in known.runs if run.cause == "drift" and run.state != "running"]
    last = ended[-1] if ended else None
    if last is None or (known.reset_at is not None and known.reset_at >= last.granted_at):
        return None
    why = None
    if last.state == "crashed" or last.outcome != "candidate":
        why = f"ended as {last.outcome or 'killed'}"
    elif last.body.get("version") in request.failed_versions:
        why = f"gave version {last.body['version']}, which a person rejected or rolled back"
    elif last.body.get("version") == request.champion and set(last.body.get("detectors", ())) & set(request.detectors):
        why = f"gave version {request.champion}, which sees the same drift"
    if why is None:
        return None
    return Decision(
        "refused",
        "loop breaker",
        f"the training that drift started at {_shown(last.granted_at)} did not help: it {why}. "
        f"A person has to look (visionloop governor reset --as WHO --reason ...)",
    )


def _schedule(request: Request) -> Decision | None:
    if request.overdue:
        return Decision("refused", "overdue", request.overdue)
    if request.changed:
        return None
    return Decision("refused", "nothing changed", "data, recipe and code are those of the latest run: it would say the same")


def _shown(moment: datetime.datetime) -> str:
    return f"{moment.isoformat(timespec='minutes')[:16]} UTC"


class Governor:
    """The governor behind one database; its policy is read once something has to be decided."""

    def __init__(self, database: Database, policy: GovernorPolicy | Callable[[], GovernorPolicy]) -> None:
        self._database, self._policy = database, policy

    @property
    def policy(self) -> GovernorPolicy:
        """What it decides by."""
        return self._policy() if callable(self._policy) else self._policy

    def ask(self, request: Request, *, holder: str) -> Decision:
        """Decide, and write the decision; a grant is a lease of `holder`.

        Raises RegistryUnavailable when the database does not answer: then nothing is granted.
        """
        with self._database.transaction() as connection:
            at = _time(connection)
            _expire_leases(connection, request.model, at)
            found = decide(request, _known(connection, request.model), self.policy, at)
            body = {
                "data_version": request.data_version,
                "diagnosis": request.diagnosis,
                "detectors": list(request.detectors),
                "holder": holder,
            }
            row = {"at": _text(at), "model": request.model, "key": request.key, "cause": request.cause}
            told = {"decision": found.answer, "rule": found.rule, "reason": found.reason, "body": canonical_json(body)}
            inserted = connection.execute(decisions.insert().values(**row, **told)).inserted_primary_key
            assert inserted is not None
            if found.answer == "granted":
                _grant(connection, request, holder, at, self.policy, body)
        return Decision(found.answer, found.rule, found.reason, int(inserted[0]), at)

    def renew(self, key: str, holder: str) -> bool:
        """Say that the run lives; False when the lease is another's by now.

        One that was taken for dead, on a laptop that slept, and that nobody took up, lives again.
        """
        with self._database.transaction() as connection:
            until = _text(_time(connection) + datetime.timedelta(seconds=self.policy.lease_s))
            mine = (runs.c.key == key) & (runs.c.holder == holder) & (runs.c.state != "finished")
            values = {"lease_until": until, "state": "running", "ended_at": None}
            return connection.execute(runs.update().where(mine).values(**values)).rowcount == 1

    def end(self, key: str, holder: str, outcome: Outcome, facts: Mapping[str, Any]) -> bool:
        """Close the run; False when the lease is another's by now."""
        with self._database.transaction() as connection:
            mine = (runs.c.key == key) & (runs.c.holder == holder) & (runs.c.state != "finished")
            row = connection.execute(sa.select(runs.c.body).where(mine)).first()
            if row is None:
                return False
            body = canonical_json({**json.loads(row.body), **facts})
            values = {"state": "finished", "outcome": outcome, "ended_at": _text(now(connection)), "body": body}
            connection.execute(runs.update().where(mine).values(**values))
            return True

    def give_back(self, key: str, holder: str, *, begun: bool = True) -> None:
        """The run was stopped, or could not even begin, which costs no attempt: it may be taken up again."""
        with self._database.transaction() as connection:
            mine = (runs.c.key == key) & (runs.c.holder == holder) & (runs.c.state == "running")
            values: dict[str, Any] = {"state": "crashed", "ended_at": _text(now(connection))}
            if not begun:
                values["attempts"] = runs.c.attempts - 1
            connection.execute(runs.update().where(mine).values(**values))

    def cancel(self, key: str) -> None:
        """A person cancelled the run: it ended, and is not taken up again."""
        with self._database.transaction() as connection:
            values = {"state": "finished", "outcome": "failed", "ended_at": _text(now(connection))}
            dead = (runs.c.key == key) & (runs.c.state == "crashed")
            connection.execute(runs.update().where(dead).values(**values))

    def awaiting_data(self, model: str, data_version: str) -> list[str]:
        """The newest request that was refused for want of new data, once the data are others and it was not asked with them.

        One that had to cool down then is told again when it has. None when it was granted since, or when a training on newer
        data came to an end since.
        """
        with self._database.transaction() as connection:
            at = _time(connection)
            mine = decisions.c.model == model
            newest = sa.select(decisions).order_by(decisions.c.seq.desc()).limit(1)
            last = connection.execute(newest.where(mine & (decisions.c.rule == "no new data"))).first()
            if last is None or json.loads(last.body)["data_version"] == data_version:
                return []
            asked = connection.execute(newest.where(mine & (decisions.c.key == last.key))).first()
            known = _known(connection, model)
        assert asked is not None
        with_these = json.loads(asked.body)["data_version"] == data_version
        if with_these and (asked.rule != "cool-down" or not self._cool(known, at)):
            return []
        later = [
            run
            for run in known.runs
            if run.key == last.key or (run.granted_at > _moment(last.at) and run.outcome in ("candidate", "rejection"))
        ]
        return [] if later else [str(last.key)]

    def _cool(self, known: Known, at: datetime.datetime) -> bool:
        drift = [run.granted_at for run in known.runs if run.cause == "drift"]
        return not drift or at >= max(drift) + datetime.timedelta(hours=self.policy.cooldown_h)

    def asked(self, key: str, model: str, cause: MachineCause) -> bool:
        """Whether this key was ever asked for."""
        with self._database.transaction() as connection:
            mine = (decisions.c.key == key) & (decisions.c.model == model) & (decisions.c.cause == cause)
            return connection.execute(sa.select(decisions.c.seq).where(mine).limit(1)).first() is not None

    def runs(self, model: str) -> list[Granted]:
        """Granted runs in order of time; those whose lease is over are told as crashed."""
        with self._database.transaction() as connection:
            _expire_leases(connection, model, _time(connection))
            return list(_known(connection, model).runs)

    def due(self, model: str) -> list[str]:
        """Keys that should be asked for again: runs that were killed, and what waits while nothing runs any more."""
        with self._database.transaction() as connection:
            at = _time(connection)
            _expire_leases(connection, model, at)
            known = _known(connection, model)
        if any(run.state == "running" for run in known.runs) or known.stopped is not None:
            return []
        killed = [run.key for run in known.runs if run.state == "crashed" and run.attempts < self.policy.max_attempts]
        cool = self._cool(known, at)
        return [*killed, *(key for key in known.queued if cool or not key.startswith("drift:"))]

    def history(
        self, model: str | None = None, *, last: int | None = None, keys: Collection[str] | None = None
    ) -> list[dict[str, Any]]:
        """The decisions in order, all of them, the `last` ones, or those about some requests."""
        query = sa.select(decisions).order_by(decisions.c.seq.desc()).limit(last)
        if model is not None:
            query = query.where(decisions.c.model == model)
        if keys is not None:
            query = query.where(decisions.c.key.in_(list(keys)))
        with self._database.transaction() as connection:
            rows = connection.execute(query).mappings().all()
        return [{**row, "body": json.loads(row["body"])} for row in reversed(rows)]

    def switch(self, kind: Literal["stop", "start", "reset"], model: str, *, by: str, reason: str) -> None:
        """A person's word: `stop` and `start` the trainings of a model ("*" for all), or `reset` the loop breaker."""
        if not by.strip() or not reason.strip():
            raise ConfigError("the governor wants to know who and why: --as and --reason")
        with self._database.transaction() as connection:
            row = {"model": model, "kind": kind, "by": by.strip(), "reason": reason.strip()}
            connection.execute(switches.insert().values(at=_text(_time(connection)), **row))

    def stopped(self, model: str) -> str | None:
        """Who switched the trainings of this model off, and why; None while they are on."""
        with self._database.transaction() as connection:
            return _stopped(connection, model)


def _grant(
    connection: sa.Connection,
    request: Request,
    holder: str,
    at: datetime.datetime,
    policy: GovernorPolicy,
    body: Mapping[str, Any],
) -> None:
    values: dict[str, Any] = {
        "state": "running",
        "holder": holder,
        "lease_until": _text(at + datetime.timedelta(seconds=policy.lease_s)),
        "data_version": request.data_version,
        "outcome": None,
        "ended_at": None,
    }
    again = runs.update().where(runs.c.key == request.key).values(**values, attempts=runs.c.attempts + 1)
    if connection.execute(again).rowcount == 0:
        fixed = {"key": request.key, "model": request.model, "cause": request.cause, "granted_at": _text(at), "attempts": 1}
        connection.execute(runs.insert().values(**fixed, **values, body=canonical_json(dict(body))))


def _expire_leases(connection: sa.Connection, model: str, at: datetime.datetime) -> None:
    """Runs that stopped saying that they live."""
    dead = (runs.c.model == model) & (runs.c.state == "running") & (runs.c.lease_until < _text(at))
    # Asked first: who only reads may stand on a disk that cannot be written.
    if connection.execute(sa.select(runs.c.key).where(dead)).first() is not None:
        connection.execute(runs.update().where(dead).values(state="crashed", ended_at=_text(at)))


def _known(connection: sa.Connection, model: str) -> Known:
    rows = connection.execute(sa.select(runs).where(runs.c.model == model).order_by(runs.c.granted_at)).fetchall()
    granted = [
        Granted(
            key=row.key,
            cause=row.cause,
            granted_at=_moment(row.granted_at),
            attempts=row.attempts,
            state=row.state,
            lease_until=_moment(row.lease_until),
            data_version=row.data_version,
            outcome=row.outcome,
            ended_at=_moment(row.ended_at) if row.ended_at else None,
            body=json.loads(row.body),
        )
        for row in rows
    ]
    latest: dict[str, str] = {}
    mine = sa.select(decisions.c.key, decisions.c.decision, decisions.c.rule).where(decisions.c.model == model)
    for row in connection.execute(mine.order_by(decisions.c.seq)):
        if row.rule != "duplicate":
            latest[row.key] = row.decision
    reset = connection.execute(
        sa.select(sa.func.max(switches.c.at)).where((switches.c.kind == "reset") & switches.c.model.in_([model, "*"]))
    ).scalar()
    return Known(
        runs=granted,
        queued=[key for key, answer in latest.items() if answer == "queued"],
        stopped=_stopped(connection, model),
        reset_at=_moment(reset) if reset else None,
    )


def _stopped(connection: sa.Connection, model: str) -> str | None:
    for name in ("*", model):
        last = connection.execute(
            sa.select(switches)
            .where((switches.c.model == name) & switches.c.kind.in_(["stop", "start"]))
            .order_by(switches.c.seq.desc())
            .limit(1)
        ).first()
        if last is not None and last.kind == "stop":
            return f"{last.by} since {last.at[:16]} UTC: {last.reason}"
    return None


def _time(connection: sa.Connection) -> datetime.datetime:
    """Now, and never before the last decision: a clock that was set back ends no lease and starts no cool-down anew."""
    last = connection.execute(sa.select(sa.func.max(decisions.c.at))).scalar()
    return max(now(connection), _moment(last)) if last else now(connection)


def _text(moment: datetime.datetime) -> str:
    return moment.isoformat(timespec="microseconds")


def _moment(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text)
