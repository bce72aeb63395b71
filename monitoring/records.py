"""The tables of the loop: alarms, what the governor decided about them, the runs it granted, labels. SQLite or PostgreSQL.

One database, one chain of transactions: a rule reads and writes in one of them, so of a hundred deliveries of one alarm
exactly one is granted.
"""

from __future__ import annotations

import sqlalchemy as sa

from components.databases import Database

_LOCK = 0x76_6C_6C_70
metadata = sa.MetaData()

alarms = sa.Table(
    "visionloop_alarms",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("key", sa.String(300), nullable=False, unique=True),
    sa.Column("at", sa.String(40), nullable=False),
    sa.Column("model", sa.String(128), nullable=False, index=True),
    sa.Column("window", sa.String(160), nullable=False, index=True),
    sa.Column("detector", sa.String(64), nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("emitted_at", sa.String(40)),
    sa.Column("emissions", sa.Integer, nullable=False, default=0),
)

decisions = sa.Table(
    "visionloop_decisions",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", sa.String(40), nullable=False),
    sa.Column("model", sa.String(128), nullable=False, index=True),
    sa.Column("key", sa.String(300), nullable=False, index=True),
    sa.Column("cause", sa.String(32), nullable=False),
    sa.Column("decision", sa.String(16), nullable=False),
    sa.Column("rule", sa.String(32), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
)

runs = sa.Table(
    "visionloop_runs",
    metadata,
    sa.Column("key", sa.String(300), primary_key=True),
    sa.Column("model", sa.String(128), nullable=False, index=True),
    sa.Column("cause", sa.String(32), nullable=False),
    sa.Column("granted_at", sa.String(40), nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("lease_until", sa.String(40), nullable=False),
    sa.Column("holder", sa.String(64), nullable=False),
    sa.Column("data_version", sa.String(64), nullable=False),
    sa.Column("outcome", sa.String(16)),
    sa.Column("ended_at", sa.String(40)),
    sa.Column("body", sa.Text, nullable=False),
)

switches = sa.Table(
    "visionloop_switches",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", sa.String(40), nullable=False),
    sa.Column("model", sa.String(128), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("by", sa.String(128), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
)

labels = sa.Table(
    "visionloop_labels",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("key", sa.String(64), nullable=False, unique=True),
    sa.Column("image_sha256", sa.String(64), nullable=False, index=True),
    sa.Column("model", sa.String(128), nullable=False, index=True),
    sa.Column("label", sa.String(256), nullable=False),
    sa.Column("by", sa.String(128), nullable=False),
    sa.Column("at", sa.String(40), nullable=False),
    sa.Column("imported_at", sa.String(40), nullable=False),
    sa.Column("source", sa.String(64), nullable=False),
)


def open_records(url: str) -> Database:
    """The loop's tables behind a SQLAlchemy URL; made on first use."""
    return Database(url, metadata, name="the database of the loop", lock=_LOCK)
