"""Where releases are published for servers: a folder or S3, the same layout in both.

    releases/<model>/<digest>/manifest.json   written last; digests of every file, and the Release
    routes/<model>.json                       what is served, moved forward only

A release is named by its digest, so what is right is known before a byte is read: publishing again repairs, and what
does not verify is never opened. Readers copy into a private folder while they hash, and load from that copy alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from urllib.parse import urlsplit

from components.contracts import (
    ConfigError,
    FileDigest,
    RegistryUnavailable,
    Release,
    Routes,
    Stored,
    StoreError,
    TamperedArtefact,
)
from components.store import MANIFEST, explained, fsync_folder, read_manifest, seal, sha256_file, unseal, write_atomically

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
MAX_RELEASE_BYTES = 8 << 30
_MAX_MANIFEST_BYTES = 4 << 20


class Objects(Protocol):
    """Named byte strings; the one thing a folder and a bucket have in common."""

    def read(self, name: str, *, most: int) -> bytes | None:
        """The whole object, None when absent; raises StoreError when it is larger than `most` bytes."""
        ...

    def chunks(self, name: str) -> Iterator[bytes]: ...

    def digest(self, name: str) -> str | None:
        """sha256 of the stored bytes, None when absent."""
        ...

    def put(self, name: str, path: Path) -> None: ...

    def swap(self, name: str, change: Callable[[bytes | None], bytes | None]) -> None:
        """Replace an object by what `change` makes of it, against concurrent swaps; None leaves it."""
        ...

    def names(self, prefix: str) -> list[str]: ...


class ReleaseStore:
    """Releases and routes behind one address: a folder, or s3://bucket/prefix."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._objects: Objects = _s3(url) if url.startswith("s3://") else _Folder(Path(url.removeprefix("file://")))

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
        record = Release.read(body["record"])
        if record.digest() != digest or record.model != model:
            raise TamperedArtefact(f"release {digest} in {self.url} describes another release; it was not read")
        return record

    def verify(self, model: str, digest: str) -> Release:
        """Read every byte of a published release; raises TamperedArtefact or StoreError."""
        record = self.manifest(model, digest)
        if record is None:
            raise StoreError(f"release {digest} of {model} is not in {self.url}; publish it again (visionloop reconcile)")
        for file in record.files:
            if self._objects.digest(f"{_place(model, digest)}/{file.name}") != file.sha256:
                raise TamperedArtefact(f"{file.name} of release {digest} in {self.url} is missing or was changed")
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
                with contextlib.suppress(FileExistsError):
                    os.rename(partial, folder)
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

    def move(self, routes: Routes) -> Routes:
        """Make `routes` what is served, unless a later generation already is; returns what is served now."""
        result: list[Routes] = []

        def change(current: bytes | None) -> bytes | None:
            try:
                present = _routes(current, routes.model, self.url)
            except TamperedArtefact:
                present = None  # the ledger's word replaces it
            if present is not None and present.generation >= routes.generation and present != routes:
                result[:] = [present]
                return None
            result[:] = [routes]
            return None if present == routes else seal(routes.to_json())

        self._objects.swap(_routes_name(routes.model), change)
        return result[0]

    def published(self, model: str) -> list[str]:
        """Digests of the releases of a model that have a manifest."""
        names = self._objects.names(f"releases/{_plain(model)}/")
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


def safe_name(name: str) -> str:
    """A relative file name without tricks; raises TamperedArtefact."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or "\0" in name or any(part in ("..", ".") for part in parts):
        raise TamperedArtefact("a manifest names a file outside its own folder; nothing was read")
    return name


class _Folder:
    def __init__(self, root: Path) -> None:
        self._root = root

    def _path(self, name: str) -> Path:
        return self._root / safe_name(name)

    def read(self, name: str, *, most: int) -> bytes | None:
        try:
            with self._path(name).open("rb") as file:
                data = file.read(most + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise RegistryUnavailable(f"the release store {self._root} cannot be read: {error.strerror}") from error
        if len(data) > most:
            raise StoreError(f"{name} is larger than {most} bytes; it was not read")
        return data

    def chunks(self, name: str) -> Iterator[bytes]:
        try:
            with self._path(name).open("rb") as file:
                while chunk := file.read(1 << 20):
                    yield chunk
        except OSError as error:
            raise StoreError(f"{name} cannot be read from {self._root}: {error.strerror}") from error

    def digest(self, name: str) -> str | None:
        path = self._path(name)
        return sha256_file(path) if path.is_file() and not path.is_symlink() else None

    def put(self, name: str, path: Path) -> None:
        target = self._path(name)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        with explained("publish", target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with path.open("rb") as source, temporary.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
            fsync_folder(target.parent)

    def swap(self, name: str, change: Callable[[bytes | None], bytes | None]) -> None:
        path = self._path(name)
        with explained("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # The lock goes with the process, also when it is killed.
            with (path.parent / f".{path.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                current = path.read_bytes() if path.is_file() else None
                wanted = change(current)
                if wanted is not None and wanted != current:
                    write_atomically(path, wanted)

    def names(self, prefix: str) -> list[str]:
        folder = self._path(prefix.rstrip("/"))
        return sorted(path.relative_to(self._root).as_posix() for path in folder.rglob("*") if path.is_file())


def _s3(url: str) -> _S3:
    parts = urlsplit(url)
    if not parts.netloc:
        raise ConfigError(f"{url} names no bucket; expected s3://bucket/prefix")
    return _S3(parts.netloc, parts.path.strip("/"), url)


class _S3:
    """Credentials, region and endpoint come from the AWS environment, as for every AWS tool."""

    def __init__(self, bucket: str, prefix: str, url: str) -> None:
        import boto3
        from botocore.config import Config

        self._bucket, self._prefix, self._url = bucket, prefix, url
        self._client: Any = boto3.client(
            "s3",
            config=Config(
                signature_version="s3v4",
                s3={"addressing_style": "path"},
                connect_timeout=3,
                read_timeout=20,
                retries={"max_attempts": 3, "mode": "standard"},
                # Servers that are not AWS often know no CRC trailers; every byte is hashed here anyway.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{safe_name(name)}" if self._prefix else safe_name(name)

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (BotoCoreError, ClientError) as error:
            raise RegistryUnavailable(
                f"the release store {self._url} does not answer: {str(error).splitlines()[0]}. Nothing half-written is "
                f"visible; bring it back and run the same command again"
            ) from error

    def _get(self, name: str) -> Any | None:
        from botocore.exceptions import ClientError

        try:
            return self._client.get_object(Bucket=self._bucket, Key=self._key(name))
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in ("NoSuchKey", "404", "NotFound"):
                return None
            raise

    def read(self, name: str, *, most: int) -> bytes | None:
        with self._answering():
            found = self._get(name)
            if found is None:
                return None
            data: bytes = found["Body"].read(most + 1)
        if len(data) > most:
            raise StoreError(f"{name} is larger than {most} bytes; it was not read")
        return data

    def chunks(self, name: str) -> Iterator[bytes]:
        with self._answering():
            found = self._get(name)
            if found is None:
                raise StoreError(f"{name} is not in {self._url}")
            yield from found["Body"].iter_chunks(1 << 20)

    def digest(self, name: str) -> str | None:
        with self._answering():
            found = self._get(name)
            if found is None:
                return None
            digest = hashlib.sha256()
            for chunk in found["Body"].iter_chunks(1 << 20):
                digest.update(chunk)
            return digest.hexdigest()

    def put(self, name: str, path: Path) -> None:
        with self._answering():
            self._client.upload_file(str(path), self._bucket, self._key(name))

    def swap(self, name: str, change: Callable[[bytes | None], bytes | None]) -> None:
        from botocore.exceptions import ClientError

        for _ in range(8):
            with self._answering():
                found = self._get(name)
                current = None if found is None else found["Body"].read()
                wanted = change(current)
                if wanted is None or wanted == current:
                    return
                # Servers without conditional writes ignore it; the generation inside then still never lets a reader back.
                condition = {"IfNoneMatch": "*"} if found is None else {"IfMatch": found["ETag"]}
                try:
                    self._client.put_object(Bucket=self._bucket, Key=self._key(name), Body=wanted, **condition)
                except ClientError as error:
                    if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in (409, 412):
                        continue
                    raise
                return
        raise RegistryUnavailable(f"{name} in {self._url} is being changed by others all the time; try again")

    def names(self, prefix: str) -> list[str]:
        with self._answering():
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._key(prefix))
            cut = len(self._prefix) + 1 if self._prefix else 0
            return sorted(item["Key"][cut:] for page in pages for item in page.get("Contents", []))
