"""The ledger: an append-only, hash-chained table of what was requested, approved, promoted and refused.

It is the truth about a model's history; MLflow's aliases and tags, and the routes that servers read, are projections of it.
SQLite and PostgreSQL, by URL.
Every row holds the hash of the row before it, so a row that is changed, removed or inserted anywhere but at the end shows
when rows are read; triggers make the database itself refuse updates, replacements and deletes. A tail cut off by somebody
with full access shows against the row numbers that MLflow's versions carry (of registrations and promotions; a decision at
the very end that is cut off and not yet promoted does not show: give nobody that access). Appending twice
under one idempotency key appends once.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from components.contracts.errors import TamperedArtefact
from components.contracts.records import Record, canonical_json
from components.databases import Database, now
from components.machine import account

Kind = Literal["requested", "excepted", "rejected", "approved", "promoted", "rolled_back"]
GENESIS = "0" * 64
_LOCK = 0x76_6C_6C_67

_metadata = sa.MetaData()
_entries = sa.Table(
    "visionloop_ledger",
    _metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("at", sa.String(40), nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("model", sa.String(128), nullable=False),
    sa.Column("subject", sa.String(64), nullable=False),
    sa.Column("actor", sa.String(256), nullable=False),
    sa.Column("actor_method", sa.String(32), nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("key", sa.String(256), nullable=False, unique=True),
    sa.Column("previous", sa.String(64), nullable=False, unique=True),
    sa.Column("hash", sa.String(64), nullable=False, unique=True),
)
_IMMUTABLE = {
    "sqlite": [
        f"CREATE TRIGGER IF NOT EXISTS visionloop_ledger_no_{verb} BEFORE {verb} ON visionloop_ledger "
        f"BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
        for verb in ("UPDATE", "DELETE")
    ]
    + [
        # INSERT OR REPLACE deletes without firing a delete trigger.
        "CREATE TRIGGER IF NOT EXISTS visionloop_ledger_no_replacement BEFORE INSERT ON visionloop_ledger "
        "WHEN EXISTS (SELECT 1 FROM visionloop_ledger "
        "WHERE seq = NEW.seq OR key = NEW.key OR previous = NEW.previous OR hash = NEW.hash) "
        "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
    ],
    "postgresql": [
        "CREATE OR REPLACE FUNCTION visionloop_ledger_refuse() RETURNS trigger AS "
        "$$ BEGIN RAISE EXCEPTION 'the ledger is append-only'; END; $$ LANGUAGE plpgsql",
        "CREATE OR REPLACE TRIGGER visionloop_ledger_immutable BEFORE UPDATE OR DELETE ON visionloop_ledger "
        "FOR EACH ROW EXECUTE FUNCTION visionloop_ledger_refuse()",
        "CREATE OR REPLACE TRIGGER visionloop_ledger_no_truncate BEFORE TRUNCATE ON visionloop_ledger "
        "FOR EACH STATEMENT EXECUTE FUNCTION visionloop_ledger_refuse()",
    ],
}


class Principal(Record):
    """Who acts, and how we know.

    `machine` for flows, `declared` for a name that nobody checked, `token`, `password` and `oidc` for a user of the console.
    """

    name: str
    method: Literal["machine", "declared", "token", "password", "oidc"]


class Entry(Record):
    """One row of the ledger."""

    seq: int
    at: str
    """UTC, ISO 8601."""
    kind: Kind
    model: str
    subject: str
    """Digest of what the row is about, such as a candidate."""
    actor: Principal
    body: dict[str, Any]
    """What the rule wrote, and the operating-system `account` that appended it; older rows lack that."""
    key: str
    previous: str
    hash: str


@dataclass(frozen=True)
class Draft:
    """A row that a rule allows."""

    kind: Kind
    subject: str
    body: Mapping[str, Any]
    key: str


Rule = Callable[[Sequence[Entry], datetime.datetime], Draft]
"""Rows of one model and the time now to the row that follows; raises DecisionRefused."""


class Ledger:
    """The ledger behind one database URL; the table is made on first use."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._database = Database(url, _metadata, name="the ledger", lock=_LOCK, once=_IMMUTABLE)

    def append(self, kind: Kind, *, model: str, subject: str, actor: Principal, body: Mapping[str, Any], key: str) -> Entry:
        """Append a row, or return the row that `key` already has."""
        with self._database.transaction() as connection:
            existing = connection.execute(sa.select(_entries).where(_entries.c.key == key)).mappings().first()
            if existing is not None:
                return _entry(dict(existing))
            return self._append(connection, Draft(kind, subject, body, key), model, actor)

    def decide(self, *, model: str, actor: Principal, rule: Rule) -> Entry:
        """Let `rule` look at the verified rows and append what it allows, all in one transaction.

        Deciders take turns: of two that exclude each other, the second sees the first one's row and is refused. A key
        that is there already is the answer to a repeated command. Raises DecisionRefused, TamperedArtefact or
        RegistryUnavailable.
        """
        with self._database.transaction() as connection:
            draft = rule([entry for entry in _verified(connection) if entry.model == model], now(connection))
            existing = connection.execute(sa.select(_entries).where(_entries.c.key == draft.key)).mappings().first()
            if existing is not None:
                return _entry(dict(existing))
            return self._append(connection, draft, model, actor)

    def _append(self, connection: sa.Connection, draft: Draft, model: str, actor: Principal) -> Entry:
        last = connection.execute(sa.select(_entries).order_by(_entries.c.seq.desc()).limit(1)).mappings().first()
        at = now(connection).isoformat(timespec="microseconds")
        values: dict[str, Any] = {
            "seq": 1 if last is None else last["seq"] + 1,
            # The order of rows is their number; a clock that was set back must not contradict it.
            "at": at if last is None else max(at, last["at"]),
            "kind": draft.kind,
            "model": model,
            "subject": draft.subject,
            "actor": actor.name,
            "actor_method": actor.method,
            # Who acts is declared; under which account that was done is a fact for the reader.
            "body": canonical_json({**draft.body, "account": account()}),
            "key": draft.key,
            "previous": GENESIS if last is None else last["hash"],
        }
        values["hash"] = _hash(values)
        connection.execute(_entries.insert().values(values))
        return _entry(values)

    def now(self) -> datetime.datetime:
        """The time by which approvals expire."""
        with self._database.transaction() as connection:
            return now(connection)

    def entries(self, model: str | None = None) -> list[Entry]:
        """Rows in order, of one model or of all; raises TamperedArtefact when the chain does not verify."""
        with self._database.transaction() as connection:
            found = _verified(connection)
        return [entry for entry in found if model is None or entry.model == model]

    def find(self, key: str) -> Entry | None:
        """The row with this idempotency key."""
        with self._database.transaction() as connection:
            row = connection.execute(sa.select(_entries).where(_entries.c.key == key)).mappings().first()
        return None if row is None else _entry(dict(row))

    def champion(self, model: str) -> Entry | None:
        """The row that made today's champion; None is proof that no champion was ever promoted.

        Raises TamperedArtefact or RegistryUnavailable, in which case nothing is known.
        """
        moves = [entry for entry in self.entries(model) if entry.kind in ("promoted", "rolled_back")]
        return moves[-1] if moves else None

    def close(self) -> None:
        self._database.close()


def _verified(connection: sa.Connection) -> list[Entry]:
    rows = connection.execute(sa.select(_entries).order_by(_entries.c.seq)).mappings().all()
    previous, found = GENESIS, []
    for position, row in enumerate(rows, start=1):
        if row["seq"] != position or row["previous"] != previous or row["hash"] != _hash(dict(row)):
            raise TamperedArtefact(
                f"the ledger is broken at row {row['seq']} (expected {position}): it was changed outside visionloop. "
                f"Nothing may be promoted from it; restore a backup (`visionloop restore FILE --into DIR`)"
            )
        previous = row["hash"]
        found.append(_entry(dict(row)))
    return found


def _hash(row: Mapping[str, Any]) -> str:
    body = {column.name: row[column.name] for column in _entries.columns if column.name != "hash"}
    return hashlib.sha256(canonical_json(body).encode()).hexdigest()


def _entry(row: Mapping[str, Any]) -> Entry:
    return Entry(
        seq=row["seq"],
        at=row["at"],
        kind=row["kind"],
        model=row["model"],
        subject=row["subject"],
        actor=Principal(name=row["actor"], method=row["actor_method"]),
        body=json.loads(row["body"]),
        key=row["key"],
        previous=row["previous"],
        hash=row["hash"],
    )
