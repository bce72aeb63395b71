"""The workspace: a directory with git, data.dvc, recipes and plug-ins of its own."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from components import data_folder, dvc_repository, git, plugins
from components.contracts.errors import ConfigError, WorkspaceBusy
from components.contracts.records import sha256_text
from components.contracts.wording import is_text
from components.store import Store, clear_unfinished, sha256_file
from flows.workspace.settings import have_home, leave_foreign_git

_CODE = Path(__file__).resolve().parents[2]
_IGNORED = ("/data/", "/.visionloop/")


@functools.cache
def lock_digest() -> str:
    """sha256 of the locked versions: requirements.lock beside the code, else every installed distribution."""
    lock = _CODE / "requirements.lock"
    if lock.is_file():
        return sha256_file(lock)
    installed = sorted(f"{d.metadata['Name']}=={d.version}" for d in metadata.distributions())
    return sha256_text("\n".join(installed))


@dataclass(frozen=True)
class Workspace:
    """A directory with git, data.dvc, recipes and plug-ins of its own, and a git-ignored `.visionloop/`."""

    root: Path

    @property
    def state(self) -> Path:
        return self.root / dvc_repository.STATE

    @property
    def data(self) -> Path:
        return self.root / data_folder.DATA

    @property
    def plugins(self) -> Path:
        return self.root / "plugins"

    @property
    def runs(self) -> Path:
        return self.state / "runs"

    @property
    def studies(self) -> Path:
        return self.state / "studies"

    @property
    def choices(self) -> Path:
        return self.state / "choices"

    @property
    def cache(self) -> Path:
        return self.state / "cache"

    @property
    def store(self) -> Store:
        return Store(self.state / "store")

    @classmethod
    def find(cls, start: Path, *, to_serve: bool = False) -> Workspace:
        """The workspace at `start` or above it; with `to_serve` also a folder that `create_to_serve` made.

        Raises ConfigError when there is none.
        """
        start = start.resolve()
        leave_foreign_git()
        for folder in (start, *start.parents):
            whole = (folder / ".dvc").is_dir() and any((place / ".git").exists() for place in (folder, *folder.parents))
            if whole or (to_serve and (folder / dvc_repository.STATE).is_dir()):
                workspace = cls(folder)
                have_home(workspace.state)
                dvc_repository.settle(folder)
                with contextlib.suppress(OSError):  # what only reads needs none, and what writes says what it could not
                    workspace.state.mkdir(mode=0o700, exist_ok=True)
                plugins.use_workspace(workspace.plugins if workspace.plugins.is_dir() else None)
                return workspace
        raise ConfigError(f"{start} is not in a visionloop workspace; make one with `visionloop init {start}`")

    @classmethod
    def create(cls, root: Path, *, own_repository: bool = False) -> Workspace:
        """Make `root` a workspace; what is already there is left alone.

        In a folder of a git repository that one holds it, unless it is to have its own. Raises ConfigError or DataError.
        """
        root = root.resolve()
        leave_foreign_git()
        if not is_text(str(root)):
            raise ConfigError(f"{data_folder.shown(root)}: the path holds characters that are no text; choose another")
        if root.exists() and not root.is_dir():
            raise ConfigError(f"{root} is a file; name a folder for the workspace")
        dvc_repository.initialise(root, own_repository=own_repository)
        ignore = root / ".gitignore"
        there = ignore.read_bytes().splitlines() if ignore.exists() else []
        dvc_repository.add_lines(ignore, tuple(line for line in _IGNORED if line.rstrip("/").encode() not in there))
        (root / "recipes").mkdir(exist_ok=True)
        git.stage(root, ".gitignore")
        return cls.find(root)

    @classmethod
    def create_to_serve(cls, root: Path) -> Workspace:
        """Make `root` a folder for servers alone, with neither data nor git; raises ConfigError."""
        root = root.resolve()
        if root.exists() and not root.is_dir():
            raise ConfigError(f"{root} is a file; name a folder for the server's own files")
        (root / dvc_repository.STATE).mkdir(parents=True, mode=0o700, exist_ok=True)
        return cls.find(root, to_serve=True)

    def expect_writable(self) -> None:
        """Raise OSError, as the system says it, where nothing can be written: servers find that out in minutes."""
        with tempfile.TemporaryFile(dir=self.state) as file:
            file.write(bytes(1 << 20))

    @contextlib.contextmanager
    def making_version(self, purpose: str) -> Iterator[None]:
        """Hold the workspace to make a data version. Raises what `locked` raises, and DataError in the middle of a merge."""
        with self.locked(purpose):
            git.expect_nothing_under_way(self.root)
            clear_unfinished(self.root)
            clear_unfinished(self.root / ".dvc", older_than_s=3600)  # there others may be writing, who hold nothing
            yield

    @contextlib.contextmanager
    def locked(self, purpose: str) -> Iterator[None]:
        """Hold the workspace; the lock goes with the process, also when it is killed. Raises WorkspaceBusy."""
        path = self.state / "lock"
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise WorkspaceBusy(
                    f"{self.root} is in use by {holder}; wait for it to end, or stop it. Nothing was changed"
                ) from None
            file.truncate(0)
            started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
            file.write(f"`{purpose}` (pid {os.getpid()} on {socket.gethostname()}, since {started})")
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)


def version() -> str:
    try:
        return metadata.version("visionloop")
    except metadata.PackageNotFoundError:
        return "unknown"
