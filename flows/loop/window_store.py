"""Where the evidence of a model's judged windows lies: a folder for each window, in a folder or on S3."""

from __future__ import annotations

import datetime
import functools
import os
import re
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from components.contracts.errors import RegistryUnavailable, UnknownName
from components.objects import open_objects

_WINDOW = re.compile(r"\d{4}-\d\d-\d\dT\d{4}Z-[0-9a-f]{10}")
"""What `window_id` makes: names that come from elsewhere lead nowhere else."""
_MAX_BYTES = 1 << 30
_RECENT = datetime.timedelta(days=3)
_AT_ONCE = 16


@functools.lru_cache(maxsize=32)
def open_windows(url: str, model: str) -> WindowStore:
    """The windows of a model at an address; the same one again shares its connections."""
    return WindowStore(url, model)


class WindowStore:
    """Files of windows, `<window>/<file>`, of one model. Threads may share it."""

    def __init__(self, url: str, model: str) -> None:
        self.url = f"{url.rstrip('/')}/{model}/windows"
        self._objects = open_objects(self.url)
        self._folder = None if url.startswith("s3://") else Path(self.url)

    def place(self, window: str, file: str = "") -> str:
        """Where a window or one of its files lies, for people."""
        return "/".join(filter(None, (self.url, window, file)))

    def path(self, window: str, file: str) -> Path | None:
        """The file itself, where it is one on this machine's disks."""
        path = self._folder / window / file if self._folder is not None else None
        return path if path is not None and path.is_file() else None

    def read(self, window: str, file: str) -> bytes | None:
        """A file of a window, None where it has none of that name; raises UnknownName for what cannot name a window."""
        if not _WINDOW.fullmatch(window):
            raise UnknownName("window", window[:100], self.names(5)[:5])
        return self._objects.read(f"{window}/{file}", most=_MAX_BYTES)

    def read_all(self, windows: Sequence[str], file: str) -> list[bytes | None]:
        """The same of several windows, in their order."""
        if self._folder is not None:
            return [self.read(window, file) for window in windows]
        with ThreadPoolExecutor(_AT_ONCE) as pool:  # most of the time is waiting for the network
            return list(pool.map(lambda window: self.read(window, file), windows))

    def write(self, window: str, file: str, data: bytes) -> None:
        """Write a file of a window, whole or not at all."""
        self._objects.write(f"{window}/{file}", data)

    def has(self, window: str, file: str) -> bool:
        """Whether a window has a file."""
        return self._objects.stamp(f"{window}/{file}") is not None

    def names(self, least: int = sys.maxsize) -> list[str]:
        """The windows, the latest first: their names begin with the time. At least so many, where there are.

        One whose judging was cut short is among them, and has no verdict.
        """
        if self._folder is not None:
            try:
                found = set(os.listdir(self._folder))
            except FileNotFoundError:
                found = set()  # before the first window
            except OSError as error:
                raise RegistryUnavailable(f"{self.url} cannot be read: {error.strerror}") from error
        else:
            # Of months of windows most pages show the last days.
            recent = f"{datetime.datetime.now(datetime.UTC) - _RECENT:%Y-%m-%d}"
            found = {PurePosixPath(name).parts[0] for name in self._objects.stamps(after=recent)}
            if len(found) < least:
                found = {PurePosixPath(name).parts[0] for name in self._objects.stamps()}
        return sorted(filter(_WINDOW.fullmatch, found), reverse=True)

    def remove(self, window: str) -> None:
        """Remove a window with all its files."""
        if self._folder is not None:
            shutil.rmtree(self._folder / window, ignore_errors=True)
        else:
            for name in self._objects.stamps(window):
                self._objects.remove(name)
