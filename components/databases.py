"""Databases: one transaction at a time on SQLite and PostgreSQL, for tables that several processes append to.

A transaction holds the database (SQLite) or a lock of the tables' own (PostgreSQL) from its first statement, so a rule that
reads and then writes is never interleaved with another one. Tables are made on first use. An SQLite file on a disk that can
only be read is read as it is, and is empty where it is not there; what would write is refused.
"""

from __future__ import annotations

import datetime
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from components.contracts.errors import ConfigError, RegistryUnavailable, VisionloopError, redacted

_READS = "visionloop_reads"
"""The option of a connection that takes no lock."""
_CHANGING = ("UPDATE", "DELETE")


class Database:
    """The tables of one metadata behind one URL.

    `name` is how errors call it, `lock` the PostgreSQL advisory lock that its transactions take, `once` the statements, by
    dialect, that follow the making of the tables.
    """

    def __init__(
        self, url: str, metadata: sa.MetaData, *, name: str, lock: int, once: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self.url, self.name = url, name
        self._metadata, self._lock, self._once = metadata, lock, once or {}
        self._absent = _absent(url)
        try:
            # libpq waits for ever for a server that accepts a connection and then says nothing.
            waiting = {"connect_timeout": 10} if url.startswith("postgresql") else {}
            self._engine = (
                sa.create_engine("sqlite://", poolclass=sa.StaticPool, connect_args={"check_same_thread": False})
                if self._absent
                else sa.create_engine(url, pool_pre_ping=True, connect_args=waiting)
            )
        except (SQLAlchemyError, ModuleNotFoundError) as error:
            raise ConfigError(f"{name}: {scheme(url)} is no database that can be opened here ({error})") from None
        if self._engine.dialect.name == "sqlite":
            # pysqlite's own transaction handling starts too late to serialise two appenders.
            sa.event.listen(self._engine, "connect", _sqlite_manual_transactions)
            sa.event.listen(self._engine, "begin", _sqlite_begin if not _only_read(url) else _sqlite_begin_reading)
        self._ready = False

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """A connection for one transaction; raises RegistryUnavailable when the database does not answer."""
        with self._answering(), self._engine.begin() as connection:
            if self._engine.dialect.name == "postgresql":
                # Held to the end of the transaction: appenders, and the first ones making the tables, take turns.
                connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({self._lock})"))
            if not self._ready:
                self._metadata.create_all(connection)
                for statement in self._once.get(self._engine.dialect.name, ()):
                    connection.execute(sa.text(statement))
                if self._absent:
                    # Readers find the empty tables of the file that is not there; writers are refused.
                    connection.exec_driver_sql("PRAGMA query_only=ON")
                self._ready = True
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection that reads what is there at one moment, and waits for nobody; raises RegistryUnavailable."""
        if not self._ready:
            with self.transaction():
                pass  # the tables are there
        with self._answering(), self._engine.connect() as connection:
            if self._engine.dialect.name == "postgresql":
                connection = connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            with connection.execution_options(**{_READS: True}).begin():
                yield connection

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Errors of the database are told as one that does not answer."""
        try:
            yield
        except (IntegrityError, VisionloopError):
            raise
        except SQLAlchemyError as error:
            cause = str(getattr(error, "orig", error)).strip().splitlines()[0]
            raise RegistryUnavailable(
                f"{self.name} at {redacted(self.url)} does not answer: {cause}. "
                f"Nothing was lost; {advice(cause)} and run the same command again"
            ) from error

    def close(self) -> None:
        """Give every connection back."""
        self._engine.dispose()


def append_only(table: str, name: str, *, unique: Sequence[str]) -> dict[str, list[str]]:
    """Statements, by dialect, after which a database refuses every change of a table but appending.

    `name` is how the refusal calls it, `unique` are the columns by which a row could take the place of another one.
    """
    same = " OR ".join(f"{column} = NEW.{column}" for column in unique)
    taken = f"EXISTS (SELECT 1 FROM {table} WHERE {same})"  # noqa: S608 - the names are our own
    refused = f"BEGIN SELECT RAISE(ABORT, '{name} is append-only'); END"
    return {
        "sqlite": [
            *(f"CREATE TRIGGER IF NOT EXISTS {table}_no_{verb} BEFORE {verb} ON {table} {refused}" for verb in _CHANGING),
            # INSERT OR REPLACE deletes without firing a delete trigger.
            f"CREATE TRIGGER IF NOT EXISTS {table}_no_replacement BEFORE INSERT ON {table} WHEN {taken} {refused}",
        ],
        "postgresql": [
            f"CREATE OR REPLACE FUNCTION {table}_refuse() RETURNS trigger AS "
            f"$$ BEGIN RAISE EXCEPTION '{name} is append-only'; END; $$ LANGUAGE plpgsql",
            f"CREATE OR REPLACE TRIGGER {table}_immutable BEFORE UPDATE OR DELETE ON {table} "
            f"FOR EACH ROW EXECUTE FUNCTION {table}_refuse()",
            f"CREATE OR REPLACE TRIGGER {table}_no_truncate BEFORE TRUNCATE ON {table} "
            f"FOR EACH STATEMENT EXECUTE FUNCTION {table}_refuse()",
        ],
    }


def scheme(url: str) -> str:
    """What an error may show of an address that cannot be read: a password may stand anywhere else in it."""
    found = re.match(r"([\w+.-]+)://", url)
    return repr(found[1]) if found else "an address without a scheme such as sqlite:/// or postgresql://"


def sqlite_file(url: str) -> Path | None:
    """The file behind an SQLite URL; None for another database, or one in memory."""
    if re.match(r"sqlite(\+\w+)?:", url) is None:
        return None
    name = sa.make_url(url).database
    if name and name.startswith("file:"):
        return Path(unquote(urlsplit(name).path))
    return Path(name) if name and name != ":memory:" else None


def _only_read(url: str) -> bool:
    """Whether a database is a file that this process can read and not write, or would be one in such a folder."""
    file = sqlite_file(url)
    return file is not None and file.parent.is_dir() and not os.access(file if file.exists() else file.parent, os.W_OK)


def _absent(url: str) -> bool:
    """Whether a database is a file that is not there and cannot be made, as its folder can only be read."""
    file = sqlite_file(url)
    return file is not None and not file.exists() and _only_read(url)


@contextmanager
def held(database: Path) -> Iterator[None]:
    """Nobody else writes into an SQLite database meanwhile; readers go on. Raises RegistryUnavailable."""
    with _sqlite(database) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


def copy_sqlite(database: Path, target: Path) -> None:
    """A copy of an SQLite database as it is at one moment, whoever writes into it meanwhile. Raises RegistryUnavailable."""
    with _sqlite(database) as connection, closing(sqlite3.connect(target)) as copy:
        connection.backup(copy)
        (told,) = copy.execute("PRAGMA integrity_check").fetchone()
        if told != "ok":
            raise RegistryUnavailable(
                f"{database} is damaged ({told.splitlines()[0]}); bring it back from an earlier backup (visionloop restore)"
            )


@contextmanager
def _sqlite(database: Path) -> Iterator[sqlite3.Connection]:
    try:
        with closing(sqlite3.connect(database, timeout=20, isolation_level=None)) as connection:
            yield connection
    except sqlite3.Error as error:
        raise RegistryUnavailable(f"{database} does not answer: {error}. Try again when nobody holds it") from error


def advice(cause: str) -> str:
    """What helps against a database's complaint; SQLite's are about a file."""
    for words, advice in {
        "is full": "free space on its disk",
        "readonly": "make its file and folder writable for this account",
        "unable to open": "make its folder readable and writable for this account",
        "locked": "end the other program that holds it",
        "malformed": "bring its file back from a backup (visionloop restore)",
        "not a database": "bring its file back from a backup (visionloop restore)",
        "disk I/O": "look at its disk",
    }.items():
        if words in cause:
            return advice
    return "bring it back"


def now(connection: sa.Connection) -> datetime.datetime:
    """The database's clock where it has one of its own: machines that share a database share its time."""
    if connection.dialect.name == "postgresql":
        found: datetime.datetime = connection.execute(sa.text("SELECT clock_timestamp()")).scalar_one()
        return found.astimezone(datetime.UTC)
    return datetime.datetime.now(datetime.UTC)


def _sqlite_manual_transactions(connection: Any, _: Any) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    # A training gives way to everything else on its machine, and holds a lock for as long as that takes.
    cursor.execute("PRAGMA busy_timeout=60000")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _sqlite_begin_reading(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _sqlite_begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN" if connection.get_execution_options().get(_READS) else "BEGIN IMMEDIATE")
