"""Artefacts on disk: written in a hidden folder, published by one rename, opened only when every byte verifies.

Layout under the store's root::

    <kind>/<key>/manifest.json   written last: digests of every other file, and the record
    .partial/<kind>-<key>/       work in progress; kept for stages that can resume
    .discarded/                  what `discard` took out of the way

`manifest.json` is canonical JSON that holds the sha256 of the rest of itself, so one changed byte anywhere
in the folder, the manifest included, is found before any parser sees the files.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.contracts.errors import StoreError, TamperedArtefact
from components.contracts.records import FileDigest, RecordT, Stored, canonical_json, sha256_text

MANIFEST = "manifest.json"
_CHUNK = 1 << 20
_SEAL = "manifest_sha256"
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def describe(path: Path, *, within: Path) -> FileDigest:
    """Name (relative to `within`), sha256 and size of a file."""
    return FileDigest(name=path.relative_to(within).as_posix(), sha256=sha256_file(path), bytes=path.stat().st_size)


def fsync_folder(folder: Path) -> None:
    """Make the folder's entries durable; renames are not, until their folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one rename: readers see the old bytes or the new ones, also after a crash."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_folder(path.parent)


def clear_unfinished(folder: Path, *, older_than_s: float = 0.0) -> None:
    """Remove what runs that were killed left of files that they were writing atomically into a folder."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if _UNFINISHED.fullmatch(path.name) and time.time() - path.lstat().st_mtime >= older_than_s:
                path.unlink()


def _regular_files(folder: Path) -> list[Path]:
    found: list[Path] = []
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise TamperedArtefact(f"{path} is a link or a special file; artefacts hold regular files only")
        found += [Path(root, name) for name in files]
    return sorted(found)


def seal(body: Mapping[str, Any]) -> bytes:
    """Canonical JSON of `body` with the sha256 of itself inside: any changed byte shows in `unseal`."""
    return canonical_json({**body, _SEAL: sha256_text(canonical_json(body))}).encode()


def unseal(raw: bytes) -> dict[str, Any] | None:
    """What was sealed, or None when the bytes are not exactly what `seal` wrote."""
    try:
        body = json.loads(raw)
        body.pop(_SEAL)
        return body if seal(body) == raw else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The folder has a living writer; the hold goes with the process, also when it is killed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _remove_unless_held(folder: Path) -> None:
    """What a killed process left goes; what another one is writing at this moment stays, and the first to end publishes."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)


def _runs(pid: str) -> bool:
    """Whether there is a process of this number; what is no number is taken for one."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):
        return True  # another account's, or no number
    return True


class Store:
    """A folder of published artefacts, one sub-folder per (kind, key)."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, kind: str, key: str) -> Path:
        return self.root / kind / key

    def _partial(self, kind: str, key: str, *, resumable: bool) -> Path:
        # Per process where nothing is resumed: what a killed run's orphan still writes is then nobody's folder.
        owner = "" if resumable else f".{os.getpid()}"
        return self.root / ".partial" / f"{kind.replace('/', '-')}-{key}{owner}"

    def open(self, kind: str, key: str, record: type[RecordT]) -> Stored[RecordT] | None:
        """The artefact if it was published and every byte verifies, None if it was never published.

        Raises TamperedArtefact or SchemaTooNew.
        """
        folder = self.folder(kind, key)
        if not folder.exists():
            return None
        manifest = read_manifest(folder)
        if manifest["kind"] != kind or manifest["key"] != key:
            raise TamperedArtefact(f"{folder} holds another artefact ({manifest['kind']}/{manifest['key']}); {_REMEDY}")
        return Stored(record.read(manifest["record"]), folder)

    def begun(self, kind: str, key: str) -> bool:
        """Whether a stage that can resume was stopped before it published this artefact, and left work."""
        return any(self._partial(kind, key, resumable=True).glob("*"))

    def give_up(self, kind: str, key: str) -> None:
        """Remove the work that a stage which can resume left: nobody goes on with it."""
        partial = self._partial(kind, key, resumable=True)
        if partial.exists():
            _remove_unless_held(partial)

    @contextlib.contextmanager
    def writing(self, kind: str, key: str, *, resumable: bool = False) -> Iterator[Path]:
        """A hidden folder to write into. It is emptied first, unless the stage can resume from what it left there."""
        partial = self._partial(kind, key, resumable=resumable)
        if not resumable:
            # Also of other keys, where their process has ended: what was measured between two runs may differ.
            named = kind.replace("/", "-")
            for stale in partial.parent.glob(f"{named}-*.*"):
                if stale.name.startswith(f"{named}-{key}.") or not _runs(stale.suffix[1:]):
                    _remove_unless_held(stale)
        partial.mkdir(parents=True, exist_ok=True)
        for leftover in partial.rglob(".*.tmp"):
            # A kill between write and rename leaves these; they are not part of what can be resumed.
            leftover.unlink()
        with explained("write", partial), _held(partial):
            yield partial

    def publish(
        self,
        kind: str,
        key: str,
        record: RecordT,
        *,
        inputs: Mapping[str, str],
        provenance: Mapping[str, Any],
        resumable: bool = False,
        leftovers: Sequence[str] = (),
        replace: bool = False,
    ) -> Stored[RecordT]:
        """Make what `writing` left visible: files synced, manifest last, one rename. Idempotent.

        Files matching `leftovers` are needed to resume only: they are kept until the manifest is written, then removed in
        this order, and are not part of the artefact. An artefact of this key stays as it is, unless `replace` sets it aside.
        """
        partial, final = self._partial(kind, key, resumable=resumable), self.folder(kind, key)
        with explained("publish", final):
            files = []
            for path in _regular_files(partial):
                if path.name == MANIFEST and path.parent == partial:
                    path.unlink()
                    continue
                if any(path.match(pattern) for pattern in leftovers):
                    continue
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                files.append(describe(path, within=partial).to_json())
            body = {
                "kind": kind,
                "key": key,
                "inputs": dict(inputs),
                "provenance": dict(provenance),
                "files": files,
                "record": record.to_json(),
            }
            write_atomically(partial / MANIFEST, seal(body))
            for pattern in leftovers:
                for path in sorted(partial.glob(pattern)):
                    path.unlink()
            for folder in {path.parent for path in partial.rglob("*")}:
                fsync_folder(folder)
            final.parent.mkdir(parents=True, exist_ok=True)
            if replace and final.exists():
                self.discard(final)
            try:
                os.rename(partial, final)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                shutil.rmtree(partial)
            fsync_folder(final.parent)
        opened = self.open(kind, key, type(record))
        assert opened is not None
        return opened

    def discard(self, folder: Path) -> Path:
        """Take an artefact out of the store without destroying it; the next run makes it anew."""
        discarded = self.root / ".discarded"
        discarded.mkdir(parents=True, exist_ok=True)
        moved = discarded / f"{folder.parent.name}-{folder.name}-{uuid.uuid4().hex[:8]}"
        os.rename(folder, moved)
        return moved

    def artefacts(self) -> list[Path]:
        """Every published folder."""
        return sorted(path.parent for path in self.root.glob(f"[!.]*/**/{MANIFEST}"))


_REMEDY = "nothing was loaded from it. Run `visionloop store verify --discard` to set it aside; the next run makes it anew"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Verify every byte of a published folder and return its manifest; raises TamperedArtefact."""
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise TamperedArtefact(f"{folder} has no readable {MANIFEST} ({error.strerror}); {_REMEDY}") from error
    body = unseal(raw)
    if body is None:
        raise TamperedArtefact(f"{path} was changed after it was published; {_REMEDY}")
    listed = {entry["name"]: entry for entry in body["files"]}
    present = {file.relative_to(folder).as_posix(): file for file in _regular_files(folder)}
    present.pop(MANIFEST, None)
    if present.keys() != listed.keys():
        changed = sorted(present.keys() ^ listed.keys())
        raise TamperedArtefact(f"{folder}: files added or missing since it was published: {', '.join(changed)}; {_REMEDY}")
    for name, entry in listed.items():
        if sha256_file(present[name]) != entry["sha256"]:
            raise TamperedArtefact(f"{present[name]} was changed after it was published; {_REMEDY}")
    return body


@contextlib.contextmanager
def explained(verb: str, place: Path) -> Iterator[None]:
    """Turn a full disk into a StoreError that says what to do; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise StoreError(
            f"no space left to {verb} {place} ({error.strerror}). Nothing half-written is visible; "
            f"free some space and run the same command again, it goes on where it stopped"
        ) from error
