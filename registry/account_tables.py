"""The tables of users, sessions and tokens, and of what is recorded of them; how their rows are read and written."""

from __future__ import annotations

import datetime
import hashlib
from typing import Any

import sqlalchemy as sa

from components.databases import Database, append_only, now

LOCK = 0x76_6C_61_63

METADATA = sa.MetaData()
USERS = sa.Table(
    "visionloop_users",
    METADATA,
    # As logins are compared; folding case may make a name three times as long.
    sa.Column("key", sa.String(512), primary_key=True),
    sa.Column("login", sa.String(128), nullable=False),
    sa.Column("name", sa.String(128), nullable=False),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("also", sa.Text, nullable=False),
    sa.Column("subject", sa.String(600), nullable=False),
    sa.Column("enabled", sa.Boolean, nullable=False),
    sa.Column("password", sa.String(256), nullable=False),
    sa.Column("made_at", sa.String(40), nullable=False),
)
SESSIONS = sa.Table(
    "visionloop_sessions",
    METADATA,
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("user", sa.String(512), nullable=False, index=True),
    sa.Column("method", sa.String(16), nullable=False),
    sa.Column("made_at", sa.String(40), nullable=False),
    sa.Column("seen_at", sa.String(40), nullable=False),
)
TOKENS = sa.Table(
    "visionloop_tokens",
    METADATA,
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("user", sa.String(512), nullable=False, index=True),
    sa.Column("name", sa.String(128), nullable=False),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("made_at", sa.String(40), nullable=False),
    sa.Column("made_by", sa.String(256), nullable=False),
    sa.Column("expires_at", sa.String(40), nullable=False),
    sa.Column("revoked_at", sa.String(40)),
)
AUDIT = sa.Table(
    "visionloop_audit",
    METADATA,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("at", sa.String(40), nullable=False),
    sa.Column("what", sa.String(64), nullable=False),
    sa.Column("who", sa.String(256), nullable=False),
    sa.Column("address", sa.String(64), nullable=False),
    sa.Column("network", sa.String(64), nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Index("visionloop_audit_recent", "network", "at"),
)
IMMUTABLE = append_only("visionloop_audit", "the audit table", unique=("seq",))


def end_sessions(url: str) -> None:
    """Forget all sessions of a database, such as of a copy that is brought back one day. Raises RegistryUnavailable."""
    database = Database(url, sa.MetaData(), name="the table of users", lock=LOCK)
    with database.transaction() as connection:
        if sa.inspect(connection).has_table(SESSIONS.name):
            connection.execute(SESSIONS.delete())
    database.close()


def rows_of(connection: sa.Connection, query: sa.Select[Any]) -> list[dict[str, Any]]:
    return [dict(row) for row in connection.execute(query).mappings()]


def first_of(connection: sa.Connection, query: sa.Select[Any]) -> dict[str, Any] | None:
    return next(iter(rows_of(connection, query)), None)


def printable(value: str, length: int) -> str:
    """A text that every database takes and every terminal shows."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in value[:length])[:length]


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def time_of(connection: sa.Connection) -> str:
    return iso(now(connection))


def iso(moment: datetime.datetime) -> str:
    return moment.isoformat(timespec="microseconds")


def moment_of(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text)
