"""Image bytes of production, by opt-in alone: sampled by content, kept for some days, and erasable for good.

Which images are kept is decided by their sha256, so the same picture is kept or not wherever it is asked. A server writes
them into its own folder. Where they are kept elsewhere they wait there, a bounded number of bytes, until
`serving/log/send_process.py` has sent them: no answer waits for an address that is away.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from components.contracts.errors import RegistryUnavailable
from serving.log.capture_store import CaptureStore
from serving.metrics import Metrics, log

_QUEUE = 256
_QUEUE_BYTES = 64 << 20
_LOOK_S = 5.0
"""How often the bytes that wait are counted anew: another process takes them away."""
_SWEEP_S = 3600.0
_TELL_S = 60.0


@dataclass(frozen=True)
class CaptureConfig:
    """What is kept; nothing by default."""

    share: float = 0.0
    """Share of the images that is kept, 0 to 1."""
    retain_days: float = 30.0
    url: str = ""
    """A folder or s3:// address where they are kept; empty for the server's own folder."""
    max_waiting_bytes: int = 1 << 30
    """Most that waits to be sent there; while there is no room, images are not kept and that is counted."""


class Captures:
    """The kept images of a server, in its own folder."""

    def __init__(self, folder: Path, config: CaptureConfig = CaptureConfig(), metrics: Metrics | None = None) -> None:
        self.store = CaptureStore(str(folder), private=True)
        self.config, self._metrics = config, metrics
        self._queue: queue.Queue[tuple[str, bytes]] = queue.Queue(_QUEUE)
        self._bytes = 0
        self._bytes_lock = threading.Lock()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._folder = folder
        self._waiting_bytes, self._counted_at = 0, 0.0
        self._untold, self._told_at = 0, 0.0

    def start(self) -> None:
        """Begin to keep what is offered, and to forget what is old."""
        self._thread = threading.Thread(target=self._keep_all, name="captures", daemon=True)
        self._thread.start()

    def wanted(self, sha256: str) -> bool:
        """Whether this image is in the sample."""
        return self.config.share > 0 and int(sha256[:8], 16) < self.config.share * 2**32

    def offer(self, sha256: str, data: bytes) -> None:
        """Keep an image if it is wanted; never waits, and a full queue keeps one image less."""
        if self._thread is None or not self.wanted(sha256):
            return
        with self._bytes_lock:
            room = self._bytes + len(data) <= _QUEUE_BYTES
            self._bytes += len(data) if room else 0
        try:
            if not room:
                raise queue.Full
            self._queue.put_nowait((sha256, data))
        except queue.Full:
            with self._bytes_lock:
                self._bytes -= len(data) if room else 0
            self._missed("queue full")

    def _keep_all(self) -> None:
        swept = 0.0
        while True:
            if time.monotonic() - swept > _SWEEP_S or not swept:
                swept = time.monotonic()
                try:
                    self.store.sweep(self.config.retain_days)
                except (OSError, RegistryUnavailable) as error:
                    log("old images stay", level=logging.WARNING, problem=str(error))
            try:
                taken = self._queue.get(timeout=1)
            except queue.Empty:
                self._count_waiting()
                if self._stopping:
                    return
                continue
            with self._bytes_lock:
                self._bytes -= len(taken[1])
            try:
                self.keep(*taken)
            except Exception as error:
                # A full disk, an erasure file changed by hand: an image less, and the thread lives.
                self._missed(f"{type(error).__name__}: {error}")

    def _missed(self, problem: str) -> None:
        if self._metrics is not None:
            self._metrics.not_captured.inc()
        self._untold += 1
        if time.monotonic() - self._told_at > _TELL_S or not self._told_at:
            # An address that is away for a day must not fill the log.
            log("image not captured", level=logging.WARNING, problem=problem, images=self._untold)
            self._untold, self._told_at = 0, time.monotonic()

    def keep(self, sha256: str, data: bytes) -> bool:
        """Write an image; False when it is there already, was erased, or what waits leaves no room for it."""
        if sha256 in self.store.erased() or self.store.has(sha256):
            return False
        if self.config.url and self._count_waiting() + len(data) > self.config.max_waiting_bytes:
            self._missed(f"{self._waiting_bytes >> 20} MB wait to be sent to {self.config.url}")
            return False
        self.store.write(sha256, data)
        self._waiting_bytes += len(data)
        if sha256 in self.store.erased():
            self.store.remove(sha256)  # erased while it was written
            return False
        if self._metrics is not None:
            self._metrics.captured.inc()
        return True

    def _count_waiting(self) -> int:
        """Bytes that wait to be sent: what was kept since the last look at the folder, and what lay there then."""
        if self.config.url and (time.monotonic() - self._counted_at > _LOOK_S or not self._counted_at):
            self._waiting_bytes, self._counted_at = bytes_in(self._folder), time.monotonic()
            if self._metrics is not None:
                self._metrics.captures_waiting.set(self._waiting_bytes)
        return self._waiting_bytes

    def close(self) -> None:
        """Keep what was offered, then stop."""
        self._stopping = True
        if self._thread is not None:
            self._thread.join(10)


def bytes_in(folder: Path) -> int:
    """Bytes of the images in a server's own folder."""
    total = 0
    for path in folder.glob("??/*"):
        try:
            total += path.stat().st_size
        except OSError:
            continue  # sent a moment ago
    return total
