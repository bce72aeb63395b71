"""One file that a workspace can be made anew from, written while it is in use, and read into an empty place.

A tar of regular files: `git.bundle`, `files/<path in the workspace>`, and last `manifest.json`, sealed, with the digest of
every file. What a backup holds, in the order in which it is taken, so that no part refers to what an earlier one lacks:

    tables      ledger (and with it users and comments), the loop's, MLflow's, those of searches, and the routes; nobody
                can append to the ledger meanwhile
    settings    recipes, loops, plug-ins, pins, DVC's configuration, hashed tokens, git's history
    artefacts   MLflow's files, releases, store, runs, windows, captures, prediction log: by digest, or with their bytes

No secret is in it but as a hash, no session (who signed in at the console does so anew), nor the pictures of data/ (they
have a remote), nor Prefect's tables (`visionloop up` makes them).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from components import dvc_repository, git
from components.companions import COMPANIONS, PIN, TEST_LEDGER
from components.contracts.errors import ConfigError, StoreError, VisionloopError, WorkspaceBusy
from components.databases import copy_sqlite, held, sqlite_file
from components.objects import safe_name
from components.releases import ReleaseStore
from components.store import explained, fsync_folder, seal, unseal
from flows.workspace.desk import artifacts_of
from flows.workspace.settings import Settings, own_captures, read_settings, sqlite_url
from flows.workspace.workspace import Workspace, version
from registry.account_tables import end_sessions
from registry.ledger import Ledger

FORMAT = 1
_MANIFEST, _BUNDLE, _FILES = "manifest.json", "git.bundle", "files"
_MAX_MANIFEST = 256 << 20
_STATE = dvc_repository.STATE
_SETTINGS = (
    "recipes",
    "loops",
    "plugins",
    PIN,
    TEST_LEDGER,
    *(companion.file for companion in COMPANIONS),
    ".dvc/config",
    ".dvc/.gitignore",
    ".dvcignore",
    ".gitignore",
    f"{_STATE}/serving/tokens.json",
)
# Journals before the log: a journal that is sealed in between is there twice, which readers see, and not missing.
_ARTEFACTS = ("mlflow-artifacts", "releases/releases", "store", "runs", "monitoring", "serving/captures", "serving/journal")
_LOG = "predictions"


@dataclass(frozen=True)
class Restored:
    """What came of a restore."""

    root: Path
    manifest: dict[str, Any]
    problems: list[str]
    """What does not verify although the backup holds it."""


def backup(workspace: Workspace, file: Path, *, with_artefacts: bool, force: bool) -> dict[str, Any]:
    """Write `file` whole or not at all; returns its manifest. Raises ConfigError, StoreError or DataError."""
    if file.is_dir():
        raise ConfigError(f"{file} is a folder; name the file to write, such as {file / 'backup.tar'}")
    if file.exists() and not force:
        raise ConfigError(f"{file} exists already; name another file, or use --force to replace it")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"{file.absolute().parent} is not a folder; make it first")
    settings = read_settings(workspace.state)
    partial = file.absolute().with_name(f".{file.name}.partial")
    with explained("write", file), _alone(partial, os.O_RDWR | os.O_CREAT) as descriptor:
        try:
            with os.fdopen(os.dup(descriptor), "wb") as out, tempfile.TemporaryDirectory(prefix="visionloop-") as scratch:
                out.truncate(0)
                manifest = _write(workspace, settings, out, Path(scratch), with_artefacts)
                out.flush()
                os.fsync(out.fileno())
            os.replace(partial, file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        fsync_folder(partial.parent)
    return manifest


def _write(workspace: Workspace, settings: Settings, out: IO[bytes], scratch: Path, with_artefacts: bool) -> dict[str, Any]:
    root = workspace.root
    files: list[dict[str, Any]] = []
    listed: list[dict[str, Any]] = []
    tables, elsewhere, head = _tables(workspace, settings, scratch)
    commit, dirty = git.state(root)
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in tables:
            files += _added(path, f"{_FILES}/{_STATE}/{path.relative_to(scratch).as_posix()}", archive)
        if commit != "none" and git.run(root, "rev-parse", "--show-prefix"):
            elsewhere["git"] = "the workspace is a folder of a larger repository; push that"
        elif commit != "none":
            if git.run(root, "rev-parse", "--is-shallow-repository") == "true":
                raise ConfigError(
                    f"{root} is a shallow clone, whose history is incomplete; run `git fetch --unshallow` first"
                )
            git.run(root, "bundle", "create", "--quiet", str(scratch / _BUNDLE), "HEAD", "--all")
            files += _added(scratch / _BUNDLE, _BUNDLE, archive)
        for path in _regular(root, _SETTINGS):
            files += _added(path, f"{_FILES}/{path.relative_to(root).as_posix()}", archive)
        for path in _regular(workspace.state, (*_ARTEFACTS, _LOG)):
            name = f"{_FILES}/{path.relative_to(root).as_posix()}"
            if with_artefacts:
                files += _added(path, name, archive)
            else:
                listed += _added(path, name, None)
        manifest = {
            "format": FORMAT,
            "visionloop": version(),
            "workspace": str(root),
            "git_commit": commit,
            "git_branch": git.run(root, "rev-parse", "--abbrev-ref", "HEAD") if commit != "none" else "HEAD",
            "git_dirty": dirty,
            "ledger": head,
            "elsewhere": elsewhere,
            "files": files,
            "listed": listed,
        }
        sealed = seal(manifest)
        entry = tarfile.TarInfo(_MANIFEST)
        entry.size = len(sealed)
        archive.addfile(entry, io.BytesIO(sealed))
    return manifest


def _tables(
    workspace: Workspace, settings: Settings, scratch: Path
) -> tuple[list[Path], dict[str, str], dict[str, Any] | None]:
    """Copies of the tables and routes as they are at one moment; what is kept elsewhere; where the ledger ends."""
    found: list[Path] = []
    elsewhere: dict[str, str] = {}
    urls = {"ledger": settings.ledger_url, "loop": settings.loop_url, "mlflow": settings.tracking_uri}
    urls |= {"studies": settings.studies_url}
    ours = {name: sqlite_file(url) == workspace.state / f"{name}.db" for name, url in urls.items()}
    advice = "its own tools back it up (pg_dump, or a copy of the file)"
    elsewhere |= {name: advice for name, is_ours in ours.items() if not is_ours}
    places = {
        "releases": (settings.releases_url, workspace.state / "releases"),
        "predictions": (settings.predictions_url, workspace.state / "predictions"),
        "captures": (settings.captures_url, own_captures(workspace.state)),
        "windows": (settings.windows_url, workspace.state / "monitoring"),
    }
    for name, (url, ours_at) in places.items():
        if Path(url) != ours_at:
            elsewhere[name] = "it is kept outside the workspace; back it up there"
    ledger = Ledger(settings.ledger_url)
    ledger.entries()  # a chain that does not verify is no backup
    # MLflow's tags and the routes carry numbers of ledger rows: nobody appends one until all of them are copied.
    with held(workspace.state / "ledger.db") if ours["ledger"] else contextlib.nullcontext():
        for name in ("ledger", "mlflow", "loop", "studies"):
            source = workspace.state / f"{name}.db"
            if ours[name] and source.is_file():
                copy_sqlite(source, scratch / source.name)
                if name == "ledger":
                    end_sessions(sqlite_url(scratch / source.name))
                found.append(scratch / source.name)
        if "releases" not in elsewhere:
            for path in _regular(workspace.state, ("releases/routes",)):
                copy = scratch / path.relative_to(workspace.state)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
                found.append(copy)
    if not ours["ledger"]:
        return found, elsewhere, None
    rows = Ledger(sqlite_url(scratch / "ledger.db")).entries()
    return found, elsewhere, {"rows": len(rows), "hash": rows[-1].hash if rows else ""}


def _regular(root: Path, places: Sequence[str]) -> Iterator[Path]:
    """Regular files at or below some places; links, hidden work in progress and caches of Python are left out."""
    for place in places:
        start = root / place
        if start.is_file() and not start.is_symlink():
            yield start
        for folder, folders, names in os.walk(start):
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
            for path in sorted(Path(folder, name) for name in names if not name.startswith(".")):
                if path.is_file() and not path.is_symlink():
                    yield path


def _added(path: Path, name: str, archive: tarfile.TarFile | None) -> list[dict[str, Any]]:
    """Digest and size of a file, as it is put into the archive; nothing for one that was removed meanwhile."""
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        return []
    with stream:
        # What is appended later, to a journal, is not in it.
        entry = tarfile.TarInfo(name)
        status = os.fstat(stream.fileno())
        entry.size, entry.mode, entry.mtime = status.st_size, 0o600, status.st_mtime
        reader = _Hashing(stream, entry.size)
        if archive is not None:
            archive.addfile(entry, reader)
        while reader.read(1 << 20):
            pass
    return [{"name": name, "bytes": entry.size, "sha256": reader.digest.hexdigest()}]


class _Hashing(io.RawIOBase):
    """The first `size` bytes of a stream, hashed as they are read."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream, self._left, self.digest = stream, size, hashlib.sha256()

    def read(self, size: int = -1, /) -> bytes:
        data = self._stream.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        self.digest.update(data)
        return data


@contextlib.contextmanager
def _alone(path: Path, flags: int) -> Iterator[int]:
    """A descriptor of work in progress that nobody else has, at a fixed name: what a kill left is written over."""
    descriptor = os.open(path, flags, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkspaceBusy(f"another process is writing {path}; wait for it to end") from None
        yield descriptor
    finally:
        os.close(descriptor)


def restore(file: Path, into: Path) -> Restored:
    """Make the workspace of a backup in an empty place, whole or not at all, after every byte of it was verified."""
    into = into.absolute()
    if into.is_symlink() or (into.exists() and (not into.is_dir() or any(into.iterdir()))):
        raise ConfigError(f"{into} is not empty; a backup is restored into an empty or a new folder (--into DIR)")
    manifest = read(file)
    into.parent.mkdir(parents=True, exist_ok=True)
    scratch = into.with_name(f".{into.name}.restoring")
    scratch.mkdir(mode=0o700, exist_ok=True)
    try:
        with explained("restore into", into), _alone(scratch, os.O_RDONLY):
            for left in scratch.iterdir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            with _whole(file):
                _extract(file, manifest, scratch)
            _expect_ledger(scratch, manifest)
            scratch.chmod(into.stat().st_mode & 0o777 if into.exists() else 0o777 & ~_umask())
            os.rename(scratch, into)
            fsync_folder(into.parent)
    except WorkspaceBusy:
        raise
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return Restored(into, manifest, _problems(into, manifest))


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current


def read(file: Path) -> dict[str, Any]:
    """The manifest of a backup, once every byte of it was found to be what it says. Raises StoreError."""
    found: dict[str, tuple[int, str]] = {}
    body: dict[str, Any] | None = None
    with _whole(file):
        if file.exists() and not file.is_file():
            raise FileNotFoundError  # a pipe would be waited for
        for member, stream in _members(file):
            if member.name == _MANIFEST:
                body = unseal(stream.read(_MAX_MANIFEST))
                continue
            reader = _Hashing(stream, member.size)
            while reader.read(1 << 20):
                pass
            found[member.name] = (member.size, reader.digest.hexdigest())
    if body is None:
        raise StoreError(f"{file} is no whole backup: it has no intact {_MANIFEST} at its end. It was cut short or changed")
    if body.get("format") != FORMAT:
        raise StoreError(f"{file} is a backup of format {body.get('format')}; this visionloop reads format {FORMAT}")
    told = {entry["name"]: (entry["bytes"], entry["sha256"]) for entry in body["files"]}
    if told != found:
        names = ", ".join(sorted(name for name in {*told, *found} if told.get(name) != found.get(name))[:3])
        raise StoreError(
            f"{file} is damaged: {names} is not what its manifest says. Nothing was restored; use another backup"
        )
    return body


@contextlib.contextmanager
def _whole(file: Path) -> Iterator[None]:
    """Say of what cannot be read as an archive that it is none."""
    try:
        yield
    except (tarfile.TarError, EOFError) as error:
        raise StoreError(f"{file} is not a backup, or was cut short ({error}); nothing was restored") from error
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"{file} is no file; name one that `visionloop backup` wrote") from None


def _members(file: Path) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    """The members of an archive that may be in a backup, each once; raises StoreError for any other."""
    seen: set[str] = set()
    # Uncompressed alone: what comes out is no more than what is there.
    with tarfile.open(file, "r:") as archive:
        for member in archive:
            parts = Path(safe_name(member.name)).parts
            allowed = member.name in (_MANIFEST, _BUNDLE) or (len(parts) > 1 and parts[0] == _FILES and parts[1] != ".git")
            if not allowed or not member.isreg() or member.issparse() or member.name in seen:
                raise StoreError(f"{file} holds {member.name!r}, which no backup has; nothing was restored")
            seen.add(member.name)
            stream = archive.extractfile(member)
            assert stream is not None
            yield member, stream


def _extract(file: Path, manifest: dict[str, Any], scratch: Path) -> None:
    """The files of a verified backup into an empty folder, verified again as they are written."""
    told = {entry["name"]: entry["sha256"] for entry in manifest["files"]}
    bundle = scratch / _BUNDLE
    for first in (True, False):  # git's tree first, then what was not committed
        for member, stream in _members(file):
            if member.name == _MANIFEST or (member.name == _BUNDLE) != first:
                continue
            target = bundle if first else scratch / Path(member.name).relative_to(_FILES)
            if not target.parent.resolve().is_relative_to(scratch.resolve()):
                raise StoreError(f"{file}: {member.name} leads out of the workspace through a link; nothing was restored")
            target.parent.mkdir(mode=0o700 if _STATE in target.parts else 0o777, parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            reader = _Hashing(stream, member.size)
            with target.open("wb") as out:
                shutil.copyfileobj(reader, out, 1 << 20)
                out.flush()
                os.fsync(out.fileno())
            if reader.digest.hexdigest() != told.get(member.name):
                raise StoreError(f"{file} was changed while it was read; nothing was restored")
            # Runs are listed, and kept images outdated, by when they were written.
            os.utime(target, (member.mtime, member.mtime))
            if target.name == "tokens.json":
                target.chmod(0o600)
        if first:
            _repository(bundle, scratch, manifest["git_branch"])
    (scratch / ".dvc").mkdir(exist_ok=True)
    (scratch / _STATE).mkdir(mode=0o700, exist_ok=True)
    (scratch / _STATE).chmod(0o700)


def _repository(bundle: Path, scratch: Path, branch: str) -> None:
    git.run(scratch, "init", "--quiet", "--initial-branch=main")
    if not bundle.is_file():
        return  # nothing was committed
    everything = ("+refs/*:refs/*", "+HEAD:refs/visionloop/head")
    git.run(scratch, "fetch", "--quiet", "--update-head-ok", str(bundle), *everything)
    bundle.unlink()
    if branch != "HEAD":
        git.run(scratch, "symbolic-ref", "HEAD", f"refs/heads/{branch}")
        git.run(scratch, "reset", "--quiet", "--hard")
    else:
        git.run(scratch, "checkout", "--quiet", "--detach", "refs/visionloop/head")
    git.run(scratch, "update-ref", "-d", "refs/visionloop/head")


def _expect_ledger(scratch: Path, manifest: dict[str, Any]) -> None:
    head = manifest["ledger"]
    if head is not None:
        rows = Ledger(sqlite_url(scratch / _STATE / "ledger.db")).entries()
        if (len(rows), rows[-1].hash if rows else "") != (head["rows"], head["hash"]):
            raise StoreError("the ledger of this backup does not end where its manifest says; nothing was restored")


def _problems(root: Path, manifest: dict[str, Any]) -> list[str]:
    """Releases of champions that do not verify in a restored workspace, where its backup holds their bytes."""
    workspace = Workspace.find(root)
    settings = read_settings(workspace.state)
    artifacts_of(workspace, settings)  # MLflow's tables name this place from now on
    if manifest["ledger"] is None or manifest["listed"]:
        return []
    found = []
    ledger = Ledger(settings.ledger_url)
    for model in sorted({entry.model for entry in ledger.entries()}):
        champion = ledger.champion(model)
        if champion is not None:
            try:
                ReleaseStore(settings.releases_url).verify(model, champion.body["release"])
            except VisionloopError as error:
                found.append(str(error))
    return found
