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
from components.databases import Database, append_only, now, sqlite_file
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
_IMMUTABLE = append_only("visionloop_ledger", "the ledger", unique=("seq", "key", "previous", "hash"))


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
            draft = rule([entry for entry in _chained(connection) if entry.model == model], now(connection))
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
            found = _chained(connection)
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


class FollowedLedger(Ledger):
    """The ledger for a process that reads it often: a row is verified once, when it is new. Threads may share it.

    The first reading verifies the chain whole. A later one verifies the rows that came since, that the last row which was
    verified before still is what it was, and that none is missing below it. So a row further down that is changed while the
    process runs is not seen here; `decide` and `visionloop ledger verify` look at every row, as ever.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._verified = _Verified((), {})
        self._file = sqlite_file(url)
        self._file_identity = self._identity()

    def entries(self, model: str | None = None) -> list[Entry]:
        """See `Ledger.entries`; also raises TamperedArtefact when rows that were verified before are gone or others."""
        verified = self._follow()
        return list(verified.rows if model is None else verified.by_model.get(model, ()))

    def now(self) -> datetime.datetime:
        """See `Ledger.now`."""
        with self._database.reading() as connection:
            return now(connection)

    def _follow(self) -> _Verified:
        # No lock: what is known is replaced as a whole, and whoever replaces it with less verifies the rest once more.
        known = self._verified
        head = known.rows[-1] if known.rows else None
        if (identity := self._identity()) != self._file_identity:
            # Another file lies in its place; connections that are open would go on reading the one that was taken away.
            self._database.close()
            self._file_identity = identity
        with self._database.reading() as connection:
            if head is None:
                found = _chained(connection)
            else:
                found = _chained(connection, first=head.seq, previous=head.previous)
                num_rows = connection.execute(sa.select(sa.func.count()).select_from(_entries)).scalar_one()
                if not found or found[0] != head or num_rows != found[-1].seq:
                    raise _broken(head.seq, "rows that were verified before are gone or were replaced")
                del found[0]
        if found:
            known = self._verified = known.extended(found)
        return known

    def _identity(self) -> tuple[int, int] | None:
        """Which file an SQLite database is."""
        try:
            status = self._file.stat() if self._file else None
        except OSError:
            return None
        return (status.st_dev, status.st_ino) if status else None


@dataclass(frozen=True)
class _Verified:
    """Rows whose chain was verified."""

    rows: tuple[Entry, ...]
    by_model: Mapping[str, tuple[Entry, ...]]

    def extended(self, rows: Sequence[Entry]) -> _Verified:
        new: dict[str, list[Entry]] = {}
        for row in rows:
            new.setdefault(row.model, []).append(row)
        by_model = {model: (*self.by_model.get(model, ()), *of) for model, of in new.items()}
        return _Verified((*self.rows, *rows), {**self.by_model, **by_model})


def _chained(connection: sa.Connection, *, first: int = 1, previous: str = GENESIS) -> list[Entry]:
    """The rows from number `first` on, each verified to follow the one before, the first to follow the hash `previous`."""
    rows = connection.execute(sa.select(_entries).where(_entries.c.seq >= first).order_by(_entries.c.seq)).mappings().all()
    found = []
    for position, row in enumerate(rows, start=first):
        if row["seq"] != position or row["previous"] != previous or row["hash"] != _hash(dict(row)):
            raise _broken(row["seq"], f"expected {position}")
        previous = row["hash"]
        found.append(_entry(dict(row)))
    return found


def _broken(row: int, what: str) -> TamperedArtefact:
    return TamperedArtefact(
        f"the ledger is broken at row {row} ({what}): it was changed outside visionloop. "
        f"Nothing may be promoted from it; restore a backup (`visionloop restore FILE --into DIR`)"
    )


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
