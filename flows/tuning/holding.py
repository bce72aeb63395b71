"""Who searches a study now: one process at a time, on whatever machine, told by a row beside the study's tables.

The row is refreshed while the search goes on, and looked at before anything is written. That of a process which ended on
this machine is taken over at once, that of one on another machine when it was not refreshed for a minute.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import sqlalchemy as sa

from components.contracts.errors import RegistryUnavailable, StudyBusy
from components.databases import Database, now
from flows.workspace.settings import began

_LOCK = 7_041_976_108
_metadata = sa.MetaData()
_searches = sa.Table(
    "visionloop_searches",
    _metadata,
    sa.Column("study", sa.String(128), primary_key=True),
    sa.Column("holder", sa.String(64), nullable=False),
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("began", sa.String(128), nullable=False),
    sa.Column("since", sa.DateTime, nullable=False),
    sa.Column("seen", sa.DateTime, nullable=False),
)
BEAT_S = 10.0
_GONE_S = 60.0


@dataclass
class Hold:
    """The right to write a study."""

    lost: threading.Event = field(default_factory=threading.Event)
    """Set when another search took the study over, as this one was not heard of for a minute."""
    asked: Callable[[], bool] = lambda: True
    """Whether the row still names this search; raises RegistryUnavailable."""

    def expect(self, study: str) -> None:
        """Raise StudyBusy where another search took it over, RegistryUnavailable where that is not known."""
        if self.lost.is_set() or not self.asked():
            self.lost.set()
            raise StudyBusy(
                f"another search took study {study!r} over, as the database did not hear of this one for "
                f"{_GONE_S:g} s; wait for that one, or stop it"
            )


@contextlib.contextmanager
def holding(url: str, study: str) -> Iterator[Hold]:
    """Hold a study; raises StudyBusy where another search does, RegistryUnavailable."""
    database = Database(url, _metadata, name="the database of studies", lock=_LOCK)
    holder, stop = uuid.uuid4().hex, threading.Event()

    def asked() -> bool:
        with database.reading() as connection:
            mine = _searches.c.study == study, _searches.c.holder == holder
            return connection.execute(_searches.select().where(*mine)).one_or_none() is not None

    hold = Hold(asked=asked)
    _take(database, study, holder)
    beat = threading.Thread(target=_beat, args=(database, study, holder, hold, stop), daemon=True, name="study")
    beat.start()
    try:
        yield hold
    finally:
        stop.set()
        beat.join(BEAT_S)
        with contextlib.suppress(RegistryUnavailable), database.transaction() as connection:
            connection.execute(_searches.delete().where(_searches.c.study == study, _searches.c.holder == holder))
        database.close()


def _take(database: Database, study: str, holder: str) -> None:
    with database.transaction() as connection:
        moment = now(connection).replace(tzinfo=None)
        row = connection.execute(_searches.select().where(_searches.c.study == study)).one_or_none()
        if row is not None and not _gone(row, moment):
            ago = max(0, round((moment - row.seen).total_seconds()))
            raise StudyBusy(
                f"study {study!r} is searched by the process {row.pid} on {row.host}, since {row.since:%Y-%m-%d %H:%M:%S} "
                f"UTC and last heard of {ago} s ago; wait for it to end, or stop it. A search that was killed on another "
                f"machine gives way {_GONE_S:g} s after it was last heard of. Nothing was changed"
            )
        connection.execute(_searches.delete().where(_searches.c.study == study))
        connection.execute(
            _searches.insert().values(
                study=study,
                holder=holder,
                host=socket.gethostname(),
                pid=os.getpid(),
                began=began(os.getpid()) or "",
                since=moment,
                seen=moment,
            )
        )


def _gone(row: sa.Row[tuple[object, ...]], moment: datetime.datetime) -> bool:
    """Whether the process that a row tells of has ended: its number tells that in the boot that it began in.

    Other machines, such as those made of one image, may have this one's name.
    """
    boot = (began(os.getpid()) or "").rpartition(":")[0]
    if row.host == socket.gethostname() and boot and row.began.rpartition(":")[0] == boot:
        return bool(began(row.pid) != row.began)
    return bool((moment - row.seen).total_seconds() > _GONE_S)


def _beat(database: Database, study: str, holder: str, hold: Hold, stop: threading.Event) -> None:
    while not stop.wait(BEAT_S):
        # While the database is away nobody can take the study over either.
        with contextlib.suppress(RegistryUnavailable), database.transaction() as connection:
            mine = _searches.c.study == study, _searches.c.holder == holder
            moment = now(connection).replace(tzinfo=None)
            if not connection.execute(_searches.update().where(*mine).values(seen=moment)).rowcount:
                hold.lost.set()
                return
