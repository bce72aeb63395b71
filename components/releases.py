"""Where releases are published for servers: a folder or S3, the same layout in both.

    releases/<model>/<digest>/manifest.json   written last; digests of every file, and the Release
    routes/<model>.json                       what is served, moved forward only

A release is named by its digest, so what is right is known before a byte is read: publishing again repairs, and what
does not verify is never opened. Readers copy into a private folder while they hash, and load from that copy alone.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from components.contracts.errors import ConfigError, StoreError, TamperedArtefact
from components.contracts.models import Precision
from components.contracts.records import FileDigest, Stored
from components.contracts.releases import Release, Routes
from components.objects import Objects, open_objects, safe_name
from components.store import MANIFEST, explained, read_manifest, seal, sha256_file, unseal, write_atomically

REFERENCE = "reference.parquet"
GOLDEN = "golden.safetensors"
ENGINE = "engine"
"""Names in a release's folder; the engine's files lie in a folder of their own."""
TOLERANCE: dict[Precision, float] = {"fp32": 0.01, "fp16": 0.03, "int8": 0.15}
"""int8 kernels round differently with and without VNNI; top-1 of a clear answer has to stay in any case."""
INT8_ARITHMETIC = "int8_arithmetic"
"""Key in the metadata of the golden vectors of an int8 engine: how the machine multiplies that wrote them."""
SAME_ARITHMETIC_TOLERANCE = TOLERANCE["fp32"]
"""In place of that of int8, where the machine multiplies as the one that wrote the golden vectors."""
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
MAX_RELEASE_BYTES = 8 << 30
_MAX_MANIFEST_BYTES = 4 << 20


class ReleaseStore:
    """Releases and routes behind one address: a folder, or s3://bucket/prefix."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._objects: Objects = open_objects(url)

    def publish(self, release: Stored[Release]) -> str:
        """Upload the folder of a release, its manifest last; returns its digest. Idempotent, and read back."""
        record = release.record
        digest = record.digest()
        place = _place(record.model, digest)
        for file in record.files:
            path = release.folder / file.name
            if sha256_file(path) != file.sha256:
                raise TamperedArtefact(f"{path} is not the file of the release; nothing was published")
            name = f"{place}/{file.name}"
            if self._objects.digest(name) != file.sha256:
                self._objects.put(name, path)
                if self._objects.digest(name) != file.sha256:
                    raise StoreError(f"{self.url} does not hold what was just written ({name}); try again, or repair it")
        self._objects.swap(f"{place}/{MANIFEST}", lambda _: seal(_manifest(record)))
        if self.manifest(record.model, digest) != record:
            raise StoreError(f"{self.url} does not give back the manifest of {digest}; try again, or repair the store")
        return digest

    def manifest(self, model: str, digest: str) -> Release | None:
        """The Release of this digest as the store's manifest tells it, None when it was never published."""
        raw = self._objects.read(f"{_place(model, digest)}/{MANIFEST}", most=_MAX_MANIFEST_BYTES)
        if raw is None:
            return None
        body = unseal(raw)
        if body is None:
            raise TamperedArtefact(f"the manifest of release {digest} in {self.url} was changed; it was not read")
        told = body.get("record")
        record = Release.read(told if isinstance(told, dict) else {})
        for file in record.files:
            safe_name(file.name)
        if record.digest() != digest or record.model != model:
            raise TamperedArtefact(f"release {digest} in {self.url} describes another release; it was not read")
        return record

    def verify(self, model: str, digest: str) -> Release:
        """Read every byte of a published release; raises TamperedArtefact or StoreError."""
        record = self.manifest(model, digest)
        if record is None:
            raise StoreError(
                f"release {digest} of {model} is not in {self.url}; "
                f"`visionloop reconcile --repair` publishes that of the champion again"
            )
        for file in record.files:
            found = self._objects.digest(f"{_place(model, digest)}/{file.name}")
            if found is None:
                raise StoreError(f"{file.name} of release {digest} is not in {self.url}, where it was published")
            if found != file.sha256:
                raise TamperedArtefact(f"{file.name} of release {digest} in {self.url} was changed after it was published")
        return record

    def fetch(self, model: str, digest: str, *, cache: Path) -> Stored[Release]:
        """The release in `cache/<digest>`, hashed while it is copied; an earlier verified copy needs no store.

        Raises TamperedArtefact, SchemaTooNew, StoreError or RegistryUnavailable.
        """
        if not _DIGEST.fullmatch(digest):
            raise StoreError("a release is named by the 64 hex digits of its digest")
        folder = cache / digest
        if folder.exists():
            try:
                body = read_manifest(folder)
                record = Release.read(body["record"])
                if record.digest() == digest and record.model == model:
                    return Stored(record, folder)
            except StoreError:
                pass
            # Our own copy went bad: what the store holds decides.
            shutil.rmtree(folder)
        found = self.manifest(model, digest)
        if found is None:
            raise StoreError(f"release {digest} of {model} was not published to {self.url}")
        if sum(file.bytes for file in found.files) > MAX_RELEASE_BYTES:
            raise StoreError(f"release {digest} says it has more than {MAX_RELEASE_BYTES} bytes; it was not read")
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = cache / f".{digest}.{uuid.uuid4().hex}"
        try:
            with explained("copy a release into", cache):
                for file in found.files:
                    self._copy(f"{_place(model, digest)}/{file.name}", partial / file.name, file)
                write_atomically(partial / MANIFEST, seal(_manifest(found)))
                try:
                    os.rename(partial, folder)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise  # else another process brought the same bytes first
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return Stored(found, folder)

    def _copy(self, name: str, path: Path, expected: FileDigest) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        digest, size = hashlib.sha256(), 0
        with path.open("wb") as file:
            for chunk in self._objects.chunks(name):
                size += len(chunk)
                if size > expected.bytes:
                    break
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if size != expected.bytes or digest.hexdigest() != expected.sha256:
            raise TamperedArtefact(f"{name} in {self.url} is not what its manifest says; nothing was loaded from it")

    def routes(self, model: str) -> Routes | None:
        """What is to be served, None before the first promotion; raises TamperedArtefact or RegistryUnavailable."""
        return _routes(self._objects.read(_routes_name(model), most=_MAX_MANIFEST_BYTES), model, self.url)

    def move(self, routes: Routes, *, newest: Callable[[], int] | None = None, force: bool = False) -> Routes:
        """Make `routes` what is served, unless a later generation already is; returns what is served now.

        A generation beyond `newest` does not count as later, and with `force` none does. `newest` is asked after what is
        served was read: asked before, a generation that came in between would seem to lie beyond it.
        """
        result: list[Routes] = []

        def change(current: bytes | None) -> bytes | None:
            try:
                present = _routes(current, routes.model, self.url)
            except TamperedArtefact:
                present = None  # the ledger's word replaces it
            ahead = present is not None and present.generation > routes.generation and not force
            if present is not None and ahead and (newest is None or present.generation <= newest()):
                result[:] = [present]
                return None
            result[:] = [routes]
            return None if present == routes else seal(routes.to_json())

        self._objects.swap(_routes_name(routes.model), change)
        return result[0]

    def published(self, model: str) -> list[str]:
        """Digests of the releases of a model that have a manifest."""
        names = self._objects.stamps(f"releases/{_plain(model)}")
        return sorted(PurePosixPath(name).parts[2] for name in names if name.endswith(f"/{MANIFEST}"))


def _manifest(record: Release) -> dict[str, Any]:
    digest = record.digest()
    files = [file.to_json() for file in record.files]
    return {
        "kind": f"releases/{record.model}",
        "key": digest,
        "inputs": {},
        "provenance": {},
        "files": files,
        "record": record.to_json(),
    }


def _routes(raw: bytes | None, model: str, url: str) -> Routes | None:
    if raw is None:
        return None
    body = unseal(raw)
    if body is None:
        raise TamperedArtefact(f"the routes of {model} in {url} were changed by hand; run `visionloop reconcile --repair`")
    routes = Routes.read(body)
    if routes.model != model:
        raise TamperedArtefact(f"the routes of {model} in {url} are another model's; run `visionloop reconcile --repair`")
    return routes


def _plain(model: str) -> str:
    if not _NAME.fullmatch(model):
        raise ConfigError(f"{model!r} is not a model name; use a-z, 0-9, '.', '_' and '-', at most 63")
    return model


def _place(model: str, digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise StoreError("a release is named by the 64 hex digits of its digest")
    return f"releases/{_plain(model)}/{digest}"


def _routes_name(model: str) -> str:
    return f"routes/{_plain(model)}.json"
