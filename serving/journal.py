"""The journal: every prediction is in it before it is answered.

A thread appends what answers hand it, many at a time, in one write; what is written survives the death of the process at
once, and of the machine after the next sync. An answer waits for its row for a bounded time: a slow disk makes rows late
(counted), one that is full or broken loses them (counted, and told in the journal itself as a gap once it works
again). Serving never stops for it.

File: `VLJ1`, then frames `u32 length | u32 crc32 | payload`. A torn frame at the end of a killed process's journal is what
was never answered. The owner holds a lock on its file, taken before the file has its name; one without a lock belongs to
nobody any more and is sealed.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import struct
import threading
import time
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from serving.metrics import Metrics, log

MAGIC = b"VLJ1"
SUFFIX = ".journal"
_FRAME = struct.Struct("<II")
_JSON = struct.Struct("<I")
MAX_ROW = 16 << 20


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


def encode_row(facts: Mapping[str, Any], *arrays: bytes) -> bytes:
    """One prediction: JSON, then the raw arrays that its `arrays` lengths describe."""
    text = orjson.dumps({**facts, "arrays": [len(array) for array in arrays]})
    payload = b"".join((_JSON.pack(len(text)), text, *arrays))
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def read_rows(path: Path) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
    """Rows of a journal; a damaged stretch in the middle is a gap, a torn end is the end.

    Raises ValueError for a file that is no journal.
    """
    data = path.read_bytes()
    if not data.startswith(MAGIC):
        if len(data) < len(MAGIC) or not data.strip(b"\0"):
            return
        raise ValueError(f"{path.name} is not a journal")
    place = len(MAGIC)
    while place < len(data):
        payload = _payload_at(data, place)
        if payload is None:
            following = _next_frame(data, place + 1)
            if following is None:
                return  # the torn end of a process that was killed: it was never answered
            yield {"gap": 1, "since": 0.0, "until": 0.0, "reason": f"damaged at byte {place}"}, []
            place = following
            continue
        place += _FRAME.size + len(payload)
        (size,) = _JSON.unpack_from(payload)
        facts = orjson.loads(payload[_JSON.size : _JSON.size + size])
        start, arrays = _JSON.size + size, []
        for array in facts.pop("arrays"):
            arrays.append(payload[start : start + array])
            start += array
        yield facts, arrays


def _payload_at(data: bytes, place: int) -> bytes | None:
    """The payload of the frame that begins here, None when there is no whole and undamaged one."""
    if place + _FRAME.size + _JSON.size > len(data):
        return None
    length, checksum = _FRAME.unpack_from(data, place)
    start = place + _FRAME.size
    # Cheap tests first: this is also asked of every byte behind a damaged frame.
    if not _JSON.size < length <= MAX_ROW or start + length > len(data) or data[start + _JSON.size : start + 5] != b"{":
        return None
    payload = data[start : start + length]
    return payload if zlib.crc32(payload) == checksum else None


def _next_frame(data: bytes, place: int) -> int | None:
    """Where the next whole frame begins: every frame holds JSON, so it is enough to look at what precedes a brace."""
    brace = place + _FRAME.size + _JSON.size
    while (brace := data.find(b"{", brace)) >= 0:
        start = brace - _FRAME.size - _JSON.size
        if _payload_at(data, start) is not None:
            return start
        brace += 1
    return None


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
        self._file: int | None = None
        self._path = folder
        self._size = 0
        self._opened = 0.0
        self._num_rows = 0
        self._gap = 0
        self._gap_since = 0.0
        self._gap_lock = threading.Lock()
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

    def start(self) -> None:
        """Open the first file and begin; a folder that cannot be written makes gaps, not an error."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._syncer.start()

    async def write(self, rows: list[bytes]) -> bool:
        """Append rows; True once the journal holds them, False when the answer has to go without."""
        assert self._loop is not None
        if self._stopping or len(self._rows) + len(rows) > self.config.max_backlog:
            self._lose(len(rows), "backlog")
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
        with self._gap_lock:
            if not self._gap:
                self._gap_since = time.time()
            self._gap += count

    def _write_all(self) -> None:
        while True:
            self._wake.wait(timeout=1.0)
            self._wake.clear()
            while self._rows:
                taken = [self._rows.popleft() for _ in range(min(len(self._rows), 512))]
                self._metrics.journal_backlog.set(len(self._rows))
                done = self._append([row for row, _ in taken])
                waiting = [future for _, future in taken if future is not None]
                if waiting and self._loop is not None and not self._loop.is_closed():
                    self._loop.call_soon_threadsafe(_resolve, waiting, done)
            if self._gap and not self._rows:
                self._append([])  # a gap is told also when no row comes after it
            if self._num_rows and time.monotonic() - self._opened > self.config.rotate_s:
                self._rotate()
            if self._stopping and not self._rows:
                if self._gap:
                    self._append([])  # the last chance to tell it: what failed a moment ago may go now
                self._rotate()
                return

    def _append(self, rows: list[bytes]) -> bool:
        count = len(rows)
        with self._gap_lock:
            gap, since = self._gap, self._gap_since
        try:
            if self._file is None:
                self._open()
            if gap:
                told = {"gap": gap, "since": since, "until": time.time(), "reason": self._problem or "backlog"}
                rows = [encode_row(told), *rows]
            data = b"".join(rows)
            _write_whole(self._file, data)
        except OSError as error:
            if count:
                self._lose(count, "disk")
            problem = f"{error.strerror} ({errno.errorcode.get(error.errno or 0, '?')})"
            if problem != self._problem:
                log("journal cannot be written", level=logging.ERROR, problem=problem)
            self._problem = problem
            self._cut()
            return False
        if gap:
            log("journal is written again", level=logging.WARNING, lost_rows=gap)
            with self._gap_lock:
                self._gap -= gap
        self._problem = ""
        self._size += len(data)
        self._num_rows += len(rows)
        self._metrics.journal_rows.inc(count)
        if self._size > self.config.rotate_bytes:
            self._rotate()
        return True

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.folder / f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex}{SUFFIX}"
        opening = path.with_suffix(".opening")
        descriptor = os.open(opening, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            # Locked before it has the name that sealers look for: none of them can take it for an orphan.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            _write_whole(descriptor, MAGIC)
            os.rename(opening, path)
        except OSError:
            os.close(descriptor)
            opening.unlink(missing_ok=True)
            raise
        self._file, self._path, self._size = descriptor, path, len(MAGIC)
        self._opened, self._num_rows = time.monotonic(), 0

    def _cut(self) -> None:
        """Take a half-written frame off the end, so that what follows can be read."""
        if self._file is None:
            return
        try:
            os.ftruncate(self._file, self._size)
        except OSError:
            # Then nothing may follow it: the next row begins a new file.
            self._close()

    def _close(self) -> None:
        with self._sync_lock:
            if self._file is not None:
                os.close(self._file)
            self._file = None

    def _rotate(self) -> None:
        if self._file is None:
            return
        try:
            os.fdatasync(self._file)
        except OSError as error:
            log("journal cannot be synced", level=logging.ERROR, problem=str(error))
        empty = not self._num_rows
        self._close()  # and with it the lock
        if empty:
            self._path.unlink(missing_ok=True)
        self._num_rows = 0
        if not empty:
            self._rotated()

    def _sync_all(self) -> None:
        """In a thread of its own: appending goes on while the disk takes its time."""
        synced = 0
        while not self._stopping:
            time.sleep(self.config.sync_s)
            try:
                with self._sync_lock:
                    if self._file is None or self._size == synced:
                        continue
                    size, descriptor = self._size, os.dup(self._file)
                try:
                    os.fdatasync(descriptor)
                finally:
                    os.close(descriptor)
                synced = size
            except OSError as error:
                log("journal cannot be synced", level=logging.ERROR, problem=str(error))

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what is queued and release the file; call when no answer is under way any more."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)


def _write_whole(descriptor: int | None, data: bytes) -> None:
    assert descriptor is not None
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _give_up(future: asyncio.Future[bool]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())


def _resolve(futures: list[asyncio.Future[bool]], done: bool) -> None:
    for future in futures:
        if not future.done():
            future.set_result(done)
