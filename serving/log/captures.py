"""Image bytes of production, by opt-in alone: sampled by content, kept for some days, and erasable for good.

Which images are kept is decided by their sha256, so the same picture is kept or not wherever it is asked. An erasure is a
line in a hash-chained file; an erased image is removed, never kept again, and `verify` proves that it is not there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import queue
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.contracts.errors import ConfigError, TamperedArtefact
from components.contracts.records import canonical_json, sha256_text
from components.store import write_atomically
from serving.metrics import Metrics, log

_DIGEST = re.compile(r"[0-9a-f]{64}")
_ERASED = "erased.jsonl"
_QUEUE = 256
_QUEUE_BYTES = 64 << 20


@dataclass(frozen=True)
class CaptureConfig:
    """What is kept; nothing by default."""

    share: float = 0.0
    """Share of the images that is kept, 0 to 1."""
    retain_days: float = 30.0


def kept_at(folder: Path, sha256: str) -> Path:
    """Where the bytes of an image lie below the folder of captures."""
    return folder / sha256[:2] / sha256


class Captures:
    """The kept images of a server, `aa/aabb...` by sha256."""

    def __init__(self, folder: Path, config: CaptureConfig = CaptureConfig(), metrics: Metrics | None = None) -> None:
        self.folder, self.config, self._metrics = folder, config, metrics
        self._queue: queue.Queue[tuple[str, bytes]] = queue.Queue(_QUEUE)
        self._bytes = 0
        self._bytes_lock = threading.Lock()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._erased: dict[str, dict[str, Any]] = {}
        self._erased_at: int | None = None

    def path(self, sha256: str) -> Path:
        """Where an image lies, or would; raises ConfigError for what is no sha256."""
        if not _DIGEST.fullmatch(sha256):
            raise ConfigError(f"{sha256[:80]!r} is not the sha256 of an image: 64 hex digits")
        return kept_at(self.folder, sha256)

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
            if time.monotonic() - swept > 3600 or not swept:
                swept = time.monotonic()
                try:
                    self.sweep()
                except OSError as error:
                    log("old images stay", level=logging.WARNING, problem=str(error.strerror))
            try:
                taken = self._queue.get(timeout=1)
            except queue.Empty:
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
        log("image not captured", level=logging.WARNING, problem=problem)
        if self._metrics is not None:
            self._metrics.not_captured.inc()

    def keep(self, sha256: str, data: bytes) -> bool:
        """Write an image; False when it is there already or was erased."""
        path = self.path(sha256)
        if sha256 in self._erasures() or path.exists():
            return False
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(path, data)
        path.chmod(0o600)
        if sha256 in self._erasures():
            path.unlink(missing_ok=True)  # erased while it was written
            return False
        if self._metrics is not None:
            self._metrics.captured.inc()
        return True

    def close(self) -> None:
        """Keep what was offered, then stop."""
        self._stopping = True
        if self._thread is not None:
            self._thread.join(10)

    def sweep(self, now: float | None = None) -> int:
        """Remove images older than the retention; returns how many."""
        oldest = (now if now is not None else time.time()) - self.config.retain_days * 86400
        removed = 0
        for path in self.folder.glob("??/*"):
            try:
                if path.stat().st_mtime < oldest:
                    path.unlink()
                    removed += 1
            except FileNotFoundError:
                continue
        return removed

    def erase(self, sha256: str, *, by: str, reason: str) -> dict[str, Any]:
        """Remove an image for good and record it; erasing again is the same record."""
        path = self.path(sha256)
        if not by.strip() or not reason.strip():
            raise ConfigError("an erasure needs --as and --reason, for whoever has to prove it later")
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.folder / ".erasing").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            record = self._record(sha256, path, by, reason)
        path.unlink(missing_ok=True)
        for half_written in path.parent.glob(f".{sha256}.*"):
            half_written.unlink(missing_ok=True)
        return record

    def _record(self, sha256: str, path: Path, by: str, reason: str) -> dict[str, Any]:
        lines = self._lines()
        record = next((line for line in lines if line["image_sha256"] == sha256), None)
        if record is None:
            # The record first: a kill in between leaves an image that must not be there, which `verify` reports and a
            # second erasure removes.
            body = {
                "image_sha256": sha256,
                "by": by.strip(),
                "reason": reason.strip(),
                "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "found": path.exists(),
                "previous": lines[-1]["hash"] if lines else "0" * 64,
            }
            record = body | {"hash": sha256_text(canonical_json(body))}
            text = "".join(json.dumps(line) + "\n" for line in [*lines, record])
            write_atomically(self.folder / _ERASED, text.encode())
        return record

    def erasure(self, sha256: str) -> dict[str, Any] | None:
        """The record of an image's erasure; None while it was not erased."""
        return self._erasures().get(sha256)

    def _erasures(self) -> dict[str, dict[str, Any]]:
        try:
            changed = (self.folder / _ERASED).stat().st_mtime_ns
        except FileNotFoundError:
            return {}
        if changed != self._erased_at:
            self._erased, self._erased_at = {line["image_sha256"]: line for line in self._lines()}, changed
        return self._erased

    def _lines(self) -> list[dict[str, Any]]:
        try:
            text = (self.folder / _ERASED).read_text()
        except FileNotFoundError:
            return []
        previous, found = "0" * 64, []
        for line in text.splitlines():
            record = json.loads(line)
            body = {name: value for name, value in record.items() if name != "hash"}
            if body["previous"] != previous or sha256_text(canonical_json(body)) != record["hash"]:
                raise TamperedArtefact(
                    f"{self.folder / _ERASED} was changed by hand; bring it back from a backup (`visionloop restore`)"
                )
            previous = record["hash"]
            found.append(record)
        return found

    def erased(self) -> frozenset[str]:
        """Digests of the images that were erased."""
        return frozenset(self._erasures())

    def erasures(self) -> tuple[int, str]:
        """How many images were erased, and the hash of the last record.

        The chain shows records that were changed or left out, not that its end was cut off: who kept this figure sees that.
        """
        lines = self._lines()
        return len(lines), lines[-1]["hash"] if lines else "0" * 64

    def verify(self) -> list[str]:
        """What is wrong: erased images that are there, and files that are not the image they are named after."""
        erased = {line["image_sha256"] for line in self._lines()}
        found = []
        for path in sorted(self.folder.glob("??/*")):
            if path.name in erased:
                found.append(f"{path.name} was erased and is there; erase it again")
            elif hashlib.sha256(path.read_bytes()).hexdigest() != path.name:
                found.append(f"{path.name} is not the image it is named after")
        return found
