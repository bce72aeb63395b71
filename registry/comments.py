"""What people say about a version: beside the ledger, in its database, appended and never changed. It decides nothing."""

from __future__ import annotations

import unicodedata

import sqlalchemy as sa

from components.contracts.errors import ConfigError
from components.contracts.records import Record
from components.databases import Database, append_only, now
from registry.ledger import Principal

MAX_TEXT = 4000
_LOCK = 0x76_6C_63_6D
_metadata = sa.MetaData()
_comments = sa.Table(
    "visionloop_comments",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("at", sa.String(40), nullable=False),
    sa.Column("model", sa.String(128), nullable=False),
    sa.Column("version", sa.String(64), nullable=False),
    sa.Column("by", sa.String(256), nullable=False),
    sa.Column("method", sa.String(32), nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Index("visionloop_comments_of", "model", "version"),
)
_IMMUTABLE = append_only(_comments.name, "the table of comments", unique=("id",))


class Comment(Record):
    """What somebody said about a version."""

    id: int
    at: str
    """UTC, ISO 8601."""
    by: str
    method: str
    """How we know who it was; see `Principal`."""
    text: str


class Comments:
    """The comments behind one database URL; the table is made on first use. Threads may share it."""

    def __init__(self, url: str) -> None:
        self._database = Database(url, _metadata, name="the table of comments", lock=_LOCK, once=_IMMUTABLE)

    def add(self, model: str, version: str, by: Principal, text: str) -> Comment:
        """Say something; raises ConfigError for what is no text. Whether there is such a version is the caller's to know."""
        text = _checked(text)
        with self._database.transaction() as connection:
            last = connection.execute(sa.select(sa.func.max(_comments.c.id))).scalar_one() or 0
            at = now(connection).isoformat(timespec="microseconds")
            comment = Comment(id=last + 1, at=at, by=by.name, method=by.method, text=text)
            facts = comment.model_dump(exclude={"schema_version"})
            connection.execute(_comments.insert().values(facts | {"model": model, "version": version}))
        return comment

    def of(self, model: str, version: str) -> list[Comment]:
        """What was said about a version, in order."""
        query = sa.select(*(_comments.c[name] for name in Comment.model_fields if name != "schema_version"))
        query = query.where(_comments.c.model == model, _comments.c.version == version).order_by(_comments.c.id)
        with self._database.reading() as connection:
            return [Comment(**row) for row in connection.execute(query).mappings()]

    def close(self) -> None:
        self._database.close()


def _checked(text: str) -> str:
    """A comment as it is kept: lines end as they do here, and nothing in it is no text."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    if not text:
        raise ConfigError("a comment says something; this one is empty")
    if len(text) > MAX_TEXT:
        raise ConfigError(f"a comment has at most {MAX_TEXT} characters, not {len(text)}")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text if character not in "\n\t"):
        raise ConfigError("a comment is text; this one holds control characters")
    return text
