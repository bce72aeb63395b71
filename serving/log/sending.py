"""Images that wait in a server's own folder, sent to the address where they are kept.

`serving/log/send_process.py` sends, in a process of its own. An image leaves the folder when what was sent was read back;
one that was sent twice is one. Erasures go both ways, so that a server keeps nothing again that was erased elsewhere.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from components.contracts.errors import ConfigError, StoreError
from components.store import write_atomically
from serving.log.capture_store import CaptureStore, is_image_of

_AT_ONCE = 8
_SWEEP_S = 3600.0
_SWEPT = ".swept"


def send_all(folder: Path, url: str, *, retain_days: float) -> int:
    """Send what waits, exchange erasures, and now and then remove what is old at the address; returns how many were sent.

    Safe to run at any time, by anyone; what was not sent waits on. Raises RegistryUnavailable for an address that is away,
    StoreError for one that does not give back what was sent, ConfigError for one that is the folder itself.
    """
    if not url.startswith("s3://") and Path(url).is_dir() and folder.is_dir() and folder.samefile(url):
        # What is sent is removed from the folder then.
        raise ConfigError(f"{url} is the server's own folder by another path; nothing was sent. Unset VISIONLOOP_CAPTURES")
    here, there = CaptureStore(str(folder), private=True), CaptureStore(url)
    there.take_over(here.lines())
    here.take_over(there.lines())
    names = here.names()
    erased = names & there.erased().keys()
    for sha256 in erased:
        # Of a sender that was killed, or of a server that had not heard of the erasure.
        there.remove(sha256, for_good=True)
        here.remove(sha256)
    sent = _send(here, there, sorted(names - erased))
    _sweep(folder, there, retain_days)
    return sent


def _send(here: CaptureStore, there: CaptureStore, names: list[str]) -> int:
    failed = threading.Event()

    def send(sha256: str) -> bool:
        if failed.is_set():
            return False  # the others would wait for the same address, one after another
        try:
            return _sent(here, there, sha256)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return sum(pool.map(send, names))


def _sent(here: CaptureStore, there: CaptureStore, sha256: str) -> bool:
    data = here.read(sha256)
    if data is None or not is_image_of(data, sha256):
        return False  # gone; or damaged, which stays where `visionloop predictions verify` finds it until it is old
    if there.digest(sha256) != sha256:
        there.write(sha256, data)
        if there.digest(sha256) != sha256:
            raise StoreError(f"{there.place(sha256)} is not what was sent there; the image waits here")
    if sha256 in there.erased():
        there.remove(sha256, for_good=True)  # erased while it was on its way
    here.remove(sha256)
    return True


def _sweep(folder: Path, there: CaptureStore, retain_days: float) -> None:
    last = folder / _SWEPT
    if last.is_file() and time.time() - last.stat().st_mtime < _SWEEP_S:
        return
    there.sweep(retain_days)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_atomically(last, b"")
