"""The journal: every prediction is in it before it is answered.

A thread appends what answers hand it, many at a time, in one write; what is written survives the death of the process at
once, and of the machine after the next sync. An answer waits for its row for a bounded time: a slow disk makes rows late
(counted), one that is full or broken loses them. Serving never stops for it, and no loss is forgotten: every journal
begins with a place for the count of the rows that it should hold and does not, whose blocks are on the disk before the first
answer. It is overwritten in place, which a full disk allows, before the answer without its row is given.

File: a head of three blocks (`VLJ2`; the count; the count again), then frames `u32 length | u32 crc32 | payload`. The two
counts are written in turns, so one that was cut short leaves the one before it. `VLJ1` are journals of older servers: a head
of four bytes, and what was lost in frames of its own. A torn frame at the end of a killed process's journal is what was
never answered. The owner holds a lock on its file, taken before the file has its name; one without a lock belongs to nobody
any more and is sealed. A spare file keeps the place of the next journal on a disk that fills up.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import struct
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from components.contracts.errors import ConfigError
from components.journals import _FRAME, HEAD_BYTES, MAGIC, SUFFIX, Losses, _frames, _losses_in, empty_head
from serving.metrics import Metrics, log

_SPARE = ".spare"
_SET_FLAGS, _NO_COPY_ON_WRITE = 0x40086602, 0x00800000


@dataclass(frozen=True)
class JournalConfig:
    """Bounds of the journal."""

    answer_wait_s: float = 0.05
    """How long an answer waits for its row before it is given without."""
    sync_s: float = 1.0
    max_backlog: int = 20_000
    rotate_bytes: int = 16 << 20
    """Sealing a small file is short and takes little memory."""
    rotate_s: float = 300.0


@dataclass
class _Written:
    """The file that is written."""

    descriptor: int
    path: Path
    size: int = HEAD_BYTES
    num_rows: int = 0
    losses: Losses = field(default_factory=lambda: Losses(updates=1))
    since: float = field(default_factory=time.monotonic)

    @property
    def empty(self) -> bool:
        return not self.num_rows and not self.losses.gaps()


class Journal:
    """Appends rows for one server. `rotated` is called, from the writing thread, when a file is ready to be sealed."""

    def __init__(
        self, folder: Path, config: JournalConfig, metrics: Metrics, *, rotated: Callable[[], None] = lambda: None
    ) -> None:
        self.folder, self.config = folder, config
        self._metrics, self._rotated = metrics, rotated
        self._rows: deque[tuple[bytes, asyncio.Future[bool] | None]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._file: _Written | None = None
        self._torn = False
        """Whether half a frame may be at the end of the file."""
        self._removed = False
        """Whether somebody removed the file from under us."""
        self._lost = 0
        """Losses that no head holds yet."""
        self._lost_since, self._lost_reason = 0.0, ""
        self._lost_lock = threading.Lock()
        self._lost_now = 0
        """Rows lost since the last one that was written, for the message that it works again."""
        self._told_uncounted = False
        self._no_rotation_before = 0.0
        self._problem = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        for reason in ("backlog", "disk"):
            metrics.journal_lost.labels(reason)
        self._thread = threading.Thread(target=self._write_all, name="journal", daemon=True)
        self._syncer = threading.Thread(target=self._sync_all, name="journal-sync", daemon=True)
        self._sync_lock = threading.Lock()

    @property
    def problem(self) -> str:
        """Why rows are being lost; empty when none are."""
        return self._problem

    @property
    def uncounted(self) -> int:
        """Rows that were lost or not written yet, and that no file tells of."""
        return self._lost + len(self._rows)

    def start(self) -> None:
        """Open the first file and begin.

        Raises ConfigError when there is no place for a journal: then nothing could tell of what gets lost.
        """
        self._loop = asyncio.get_running_loop()
        try:
            self._file = self._opened()
        except OSError as error:
            raise ConfigError(
                f"there is no place for the journal of predictions in {self.folder}: {_told(error)}. What is answered could "
                f"neither be kept nor be counted as lost; make room there, or make the folder writable, and start again"
            ) from None
        self._thread.start()
        self._syncer.start()

    async def write(self, rows: list[bytes]) -> bool:
        """Append rows; True once the journal holds them, False when the answer has to go without."""
        assert self._loop is not None
        if self._stopping or len(self._rows) + len(rows) > self.config.max_backlog:
            self._lose(len(rows), "backlog")
            self._wake.set()
            return False
        written: asyncio.Future[bool] = self._loop.create_future()
        for row in rows[:-1]:
            self._rows.append((row, None))
        self._rows.append((rows[-1], written))
        self._wake.set()
        try:
            # Not wait_for: one timer and no task for each answer.
            timer = self._loop.call_later(self.config.answer_wait_s, _give_up, written)
            try:
                return await written
            finally:
                timer.cancel()
        except TimeoutError:
            self._metrics.journal_late.inc(len(rows))
            return False

    def _lose(self, count: int, reason: str) -> None:
        self._metrics.journal_lost.labels(reason).inc(count)
        with self._lost_lock:
            if not self._lost:
                self._lost_since = time.time()
            self._lost += count
            self._lost_now += count
            self._lost_reason = self._problem if reason == "disk" else reason

    def _write_all(self) -> None:
        while True:
            self._wake.wait(timeout=1.0)
            self._wake.clear()
            if self._removed:
                self._replace_removed()
            while self._rows:
                taken = [self._rows.popleft() for _ in range(min(len(self._rows), 512))]
                self._metrics.journal_backlog.set(len(self._rows))
                done = self._append([row for row, _ in taken])
                waiting = [future for _, future in taken if future is not None]
                if waiting and self._loop is not None and not self._loop.is_closed():
                    self._loop.call_soon_threadsafe(_resolve, waiting, done)
            self._count_losses()
            file = self._file
            if file is not None and not file.empty and time.monotonic() - file.since > self.config.rotate_s:
                self._rotate()
            if self._stopping and not self._rows:
                self._count_losses()  # the last chance: what failed a moment ago may go now
                self._finish()
                return

    def _append(self, rows: list[bytes]) -> bool:
        file = self._file
        assert file is not None
        data = b"".join(rows)
        try:
            self._cut(file)
            self._torn = True
            _write_whole(file.descriptor, data, file.size)
            self._torn = False
        except OSError as error:
            self._note(_told(error))
            self._lose(len(rows), "disk")
            self._count_losses()  # before their answers are given
            with contextlib.suppress(OSError):
                self._cut(file)
            return False
        if self._problem:
            log("journal is written again", level=logging.WARNING, lost_rows=self._lost_now)
        self._problem, self._lost_now = "", 0
        file.size += len(data)
        file.num_rows += len(rows)
        self._metrics.journal_rows.inc(len(rows))
        if file.size > self.config.rotate_bytes:
            self._rotate()
        return True

    def _note(self, problem: str) -> None:
        if problem != self._problem:
            log("journal cannot be written", level=logging.ERROR, problem=problem)
        self._problem = problem

    def _cut(self, file: _Written) -> None:
        """Take a half-written frame off the end, so that what follows can be read; raises OSError."""
        if self._torn:
            os.ftruncate(file.descriptor, file.size)
            self._torn = False

    def _count_losses(self) -> None:
        """Write into the head what was lost; what cannot be written now is tried again."""
        file = self._file
        with self._lost_lock:
            lost, since, reason = self._lost, self._lost_since, self._lost_reason
        if not lost or file is None:
            return
        losses = file.losses.plus(lost, since=since, until=time.time(), reason=reason)
        try:
            _write_whole(file.descriptor, losses.encoded(), losses.place)
        except OSError as error:
            if not self._told_uncounted:
                log("losses of the journal cannot be counted", level=logging.ERROR, problem=_told(error))
            self._told_uncounted = True
            return
        self._told_uncounted = False
        file.losses = losses
        with self._lost_lock:
            self._lost -= lost

    def _opened(self, *, orphans: bool = True) -> _Written:
        """A file to write: the spare, or else a new one, or on a full disk one that another server left; raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for spare in self.folder.glob(f"*{_SPARE}"):
            if (found := self._taken(spare)) is not None:
                return found
        try:
            return self._made()
        except OSError:
            for orphan in sorted(self.folder.glob(f"*{SUFFIX}")) if orphans else []:
                if (found := self._taken(orphan)) is not None:
                    return found
            raise

    def _new_path(self) -> Path:
        return self.folder / f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex}{SUFFIX}"

    def _made(self) -> _Written:
        path = self._new_path()
        descriptor = _made_head(path.with_suffix(".opening"))
        try:
            # Locked before it has the name that sealers look for: none of them can take it for an orphan.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.rename(path.with_suffix(".opening"), path)
        except OSError:
            os.close(descriptor)
            path.with_suffix(".opening").unlink(missing_ok=True)
            raise
        return _Written(descriptor, path)

    def _taken(self, path: Path) -> _Written | None:
        """A spare, or a journal that its server left, as ours; None where it is somebody's or cannot be written."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), path.stat()):
                raise FileNotFoundError(path)
            data = path.read_bytes()
            losses = _losses_in(data)
            if not data.startswith(MAGIC) or losses.cut_short:
                raise ValueError(f"{path.name} has no head of ours")
            found = _Written(descriptor, path, losses=losses)
            for place, payload in _frames(data):
                if payload is not None:
                    found.size, found.num_rows = place + _FRAME.size + len(payload), found.num_rows + 1
            os.ftruncate(descriptor, found.size)
            if path.suffix == _SPARE:
                found.path = self._new_path()
                os.rename(path, found.path)
        except (OSError, ValueError):
            os.close(descriptor)
            return None
        return found

    def _rotate(self) -> None:
        """Go on in another file, and let this one be sealed; where there is no place for another, this one goes on."""
        if time.monotonic() < self._no_rotation_before:
            return
        try:
            following = self._opened(orphans=False)
        except OSError:
            self._no_rotation_before = time.monotonic() + 1.0
            return
        self._finish(following)

    def _finish(self, following: _Written | None = None) -> None:
        """Release the file, to go on in the following one."""
        file = self._file
        if file is None:
            return
        try:
            os.fdatasync(file.descriptor)
        except OSError as error:
            log("journal cannot be synced", level=logging.ERROR, problem=str(error))
        with self._sync_lock:
            self._file, self._torn = following, False
            fcntl.flock(file.descriptor, fcntl.LOCK_UN)  # closing alone keeps it for as long as the other thread syncs
            os.close(file.descriptor)
        if file.empty:
            file.path.unlink(missing_ok=True)
        else:
            self._rotated()

    def _replace_removed(self) -> None:
        """Somebody removed the file, and with it what it held: that is lost, and told in the next one."""
        assert self._file is not None
        try:
            following = self._opened()
        except OSError as error:
            self._note(f"the journal was removed, and there is no place for another: {_told(error)}")
            return
        self._removed = False
        log("journal was removed", level=logging.ERROR, lost_rows=self._file.num_rows)
        self._problem = "the journal was removed"
        lost = self._file.num_rows + self._file.losses.count
        if lost:
            self._lose(lost, "disk")
        with self._sync_lock:
            os.close(self._file.descriptor)
            self._file = following

    def _sync_all(self) -> None:
        """In a thread of its own: appending goes on while the disk takes its time."""
        synced: tuple[Path | None, int, int] = (None, 0, 0)
        while True:
            try:
                self._keep_spare()
                with self._sync_lock:
                    file = self._file
                    if file is None:
                        return
                    state, descriptor = (file.path, file.size, file.losses.updates), os.dup(file.descriptor)
                try:
                    if os.fstat(descriptor).st_nlink == 0:
                        self._removed = True
                        self._wake.set()
                    elif state != synced:
                        os.fdatasync(descriptor)
                finally:
                    os.close(descriptor)
                synced = state
            except OSError as error:
                log("journal cannot be synced", level=logging.ERROR, problem=str(error))
            time.sleep(self.config.sync_s)

    def _keep_spare(self) -> None:
        """Keep the place of the next journal, while there is room."""
        if self._stopping or any(self.folder.glob(f"*{_SPARE}")):
            return
        path = self._new_path()
        with contextlib.suppress(OSError):
            os.close(_made_head(path.with_suffix(".opening")))
            os.rename(path.with_suffix(".opening"), path.with_suffix(_SPARE))

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what is queued and release the file; call when no answer is under way any more."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)


def _made_head(path: Path) -> int:
    """A new file that holds nothing but a head, in blocks that are on the disk: overwriting them takes no room."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        # Where a file system writes elsewhere what is overwritten, it is asked not to; most know no such thing.
        with contextlib.suppress(OSError):
            fcntl.ioctl(descriptor, _SET_FLAGS, struct.pack("l", _NO_COPY_ON_WRITE))
        _write_whole(descriptor, empty_head(), 0)
        os.fsync(descriptor)
    except OSError:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise
    return descriptor


def _write_whole(descriptor: int, data: bytes, place: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, place)
        view, place = view[written:], place + written


def _told(error: OSError) -> str:
    return f"{error.strerror} ({errno.errorcode.get(error.errno or 0, '?')})"


def _give_up(future: asyncio.Future[bool]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())


def _resolve(futures: list[asyncio.Future[bool]], done: bool) -> None:
    for future in futures:
        if not future.done():
            future.set_result(done)
