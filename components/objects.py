"""Named byte strings in a folder or an S3 bucket: the one thing that both have in common."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from urllib.parse import urlsplit

from components.contracts.errors import ConfigError, RegistryUnavailable, StoreError, TamperedArtefact
from components.store import explained, fsync_folder, sha256_file, write_atomically


class Objects(Protocol):
    """Named byte strings. Writes are whole or not at all."""

    def read(self, name: str, *, most: int) -> bytes | None:
        """The whole object, None when absent; raises StoreError when it is larger than `most` bytes."""
        ...

    def chunks(self, name: str) -> Iterator[bytes]: ...

    def digest(self, name: str) -> str | None:
        """sha256 of the stored bytes, None when absent."""
        ...

    def put(self, name: str, path: Path) -> None: ...

    def write(self, name: str, data: bytes) -> None:
        """Put these bytes; whoever writes last wins."""
        ...

    def remove(self, name: str, *, for_good: bool = False) -> None:
        """Remove an object, which may be absent; `for_good` with all versions of it that the store keeps."""
        ...

    def stamp(self, name: str) -> str | None:
        """What changes when the bytes of an object do, None when it is absent."""
        ...

    def written(self, prefix: str = "") -> dict[str, float]:
        """Names below a folder, each with when it was written, in seconds since 1970."""
        ...

    def written_at(self, name: str) -> float | None:
        """When an object was written, in seconds since 1970; None when it is absent."""
        ...

    def swap(self, name: str, change: Callable[[bytes | None], bytes | None]) -> None:
        """Replace an object by what `change` makes of it, against concurrent swaps; None leaves it."""
        ...

    def stamps(self, prefix: str = "", *, after: str = "") -> dict[str, str]:
        """Names below a folder, all of them for "", each with what changes when its bytes do; in order, those after one."""
        ...


def open_objects(url: str, *, private: bool = False) -> Objects:
    """The objects at a folder's path, or at s3://bucket/prefix.

    What is written one by one into a `private` folder can be read by nobody else.
    """
    return _s3(url) if url.startswith("s3://") else _Folder(Path(url.removeprefix("file://")), private=private)


def safe_name(name: str) -> str:
    """A relative file name without tricks; raises TamperedArtefact."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or "\0" in name or any(part in ("..", ".") for part in parts):
        raise TamperedArtefact("a manifest names a file outside its own folder; nothing was read")
    return name


class _Folder:
    def __init__(self, root: Path, *, private: bool = False) -> None:
        self._root, self._private = root, private

    def _path(self, name: str) -> Path:
        return self._root / safe_name(name)

    def read(self, name: str, *, most: int) -> bytes | None:
        try:
            with self._path(name).open("rb") as file:
                data = file.read(most + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise RegistryUnavailable(f"{self._root} cannot be read: {error.strerror}") from error
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
        with self._reached("read"):
            try:
                return sha256_file(path) if path.is_file() and not path.is_symlink() else None
            except FileNotFoundError:  # removed meanwhile
                return None

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

    def write(self, name: str, data: bytes) -> None:
        path = self._path(name)
        with self._reached("written"), explained("write", path):
            self._make(path.parent)
            write_atomically(path, data)
            if self._private:
                path.chmod(0o600)

    def _make(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700 if self._private else 0o777)

    @contextlib.contextmanager
    def _reached(self, done: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RegistryUnavailable(f"{self._root} cannot be {done}: {error.strerror}") from error

    def remove(self, name: str, *, for_good: bool = False) -> None:
        path = self._path(name)
        with self._reached("written"):
            path.unlink(missing_ok=True)
            # And what was being written when its writer was killed.
            for half_written in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
                half_written.unlink(missing_ok=True)

    def stamp(self, name: str) -> str | None:
        with self._reached("read"):
            try:
                return _stamp_of(self._path(name))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def written_at(self, name: str) -> float | None:
        with self._reached("read"):
            try:
                return self._path(name).stat().st_mtime
            except (FileNotFoundError, NotADirectoryError):
                return None

    def written(self, prefix: str = "") -> dict[str, float]:
        found = {}
        for name, path in self._files(prefix):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                found[name] = path.stat().st_mtime
        return found

    def swap(self, name: str, change: Callable[[bytes | None], bytes | None]) -> None:
        path = self._path(name)
        with self._reached("written"), explained("write", path):
            self._make(path.parent)
            # The lock goes with the process, also when it is killed.
            with (path.parent / f".{path.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                current = path.read_bytes() if path.is_file() else None
                wanted = change(current)
                if wanted is not None and wanted != current:
                    write_atomically(path, wanted)

    def stamps(self, prefix: str = "", *, after: str = "") -> dict[str, str]:
        found = {}
        for name, path in self._files(prefix):
            if name > after:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    found[name] = _stamp_of(path)
        return found

    def _files(self, prefix: str) -> Iterator[tuple[str, Path]]:
        folder = self._path(prefix.rstrip("/")) if prefix else self._root
        # What pathlib finds in a folder that cannot be read is nothing.
        with self._reached("read"), contextlib.suppress(FileNotFoundError):
            os.scandir(self._root).close()
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                yield path.relative_to(self._root).as_posix(), path


def _stamp_of(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _s3(url: str) -> _S3:
    parts = urlsplit(url)
    if not parts.netloc:
        raise ConfigError(f"{url} names no bucket; expected s3://bucket/prefix")
    return _S3(parts.netloc, parts.path.strip("/"), url)


S3_CONNECT_TIMEOUT_S, S3_READ_TIMEOUT_S, S3_ATTEMPTS = 3, 8, 2
"""A server that takes the connection and never answers is given up after 16 s, and one that is not there after 6 s."""


def s3_client(url: str, **config: Any) -> Any:
    """A client of S3 for one address, which its errors name; `config` is botocore's.

    Credentials, region and endpoint come from the AWS environment, as for every AWS tool. Answers of what is no S3 raise
    RegistryUnavailable.
    """
    import boto3
    from botocore.config import Config

    settings: dict[str, Any] = {
        "signature_version": "s3v4",
        "s3": {"addressing_style": "path"},
        "connect_timeout": S3_CONNECT_TIMEOUT_S,
        "read_timeout": S3_READ_TIMEOUT_S,
        # `max_attempts` would count what comes after the first.
        "retries": {"total_max_attempts": S3_ATTEMPTS, "mode": "standard"},
        # Servers that are not AWS often know no CRC trailers; every byte is hashed here anyway.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    client: Any = boto3.client("s3", config=Config(**settings | config))

    def expect_s3(operation_model: Any, response_dict: dict[str, Any], **_: Any) -> None:
        _expect_s3(operation_model.name, response_dict, client.meta.endpoint_url, url)

    client.meta.events.register("before-parse.s3", expect_s3)
    return client


def _expect_s3(operation: str, answer: dict[str, Any], endpoint: str, url: str) -> None:
    """Refuse the answer of a sign-in page or another program: botocore would take it for an object, or for none."""
    status, headers, body = answer["status_code"], answer["headers"], answer["body"]
    if status > 500 or any(name.lower().startswith("x-amz-") for name in headers):
        return  # S3's own, or of a proxy that has no server behind it at the moment: asked again
    # botocore calls a page of status 200 that is no XML a 500.
    kind = headers.get("content-type", "no content type")
    if status >= 300:
        is_s3 = operation.startswith("Head") or b"<Error" in body
    elif operation == "ListObjectsV2":
        is_s3 = b"<ListBucketResult" in body
    elif operation == "GetObject":
        is_s3 = "etag" in headers and "html" not in kind
    elif operation in ("PutObject", "UploadPart"):
        is_s3 = "etag" in headers and b"<html" not in body
    else:
        is_s3 = True
    if not is_s3:
        raise RegistryUnavailable(
            f"{endpoint}, asked for {url}, does not answer as S3 does (status {status}, {kind}); its answer was not used. "
            f"Check the address in AWS_ENDPOINT_URL and its port, and whether a proxy or the sign-in page of a network "
            f"answers in its place"
        )


class _S3:
    def __init__(self, bucket: str, prefix: str, url: str) -> None:
        self._bucket, self._prefix, self._url = bucket, prefix, url
        self._client = s3_client(url)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{safe_name(name)}" if self._prefix else safe_name(name)

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (Boto3Error, BotoCoreError, ClientError) as error:
            raise RegistryUnavailable(
                f"{self._url} does not answer: {str(error).splitlines()[0]}. Nothing half-written is "
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

    def write(self, name: str, data: bytes) -> None:
        with self._answering():
            self._client.put_object(Bucket=self._bucket, Key=self._key(name), Body=data)

    def remove(self, name: str, *, for_good: bool = False) -> None:
        key = self._key(name)
        with self._answering():
            self._client.delete_object(Bucket=self._bucket, Key=key)
            for version in self._versions(key) if for_good else []:
                self._client.delete_object(Bucket=self._bucket, Key=key, VersionId=version)

    def _versions(self, key: str) -> Iterator[str]:
        """What a bucket with versioning keeps of an object that was removed, delete markers included."""
        from botocore.exceptions import ClientError

        try:
            for page in self._client.get_paginator("list_object_versions").paginate(Bucket=self._bucket, Prefix=key):
                for item in (*page.get("Versions", []), *page.get("DeleteMarkers", [])):
                    if item["Key"] == key:
                        yield item["VersionId"]
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status not in (405, 501):  # a server that knows no versions keeps none
                raise

    def stamp(self, name: str) -> str | None:
        found = self._head(name)
        return f"{found['ContentLength']} {found['ETag']}" if found is not None else None

    def _head(self, name: str) -> Any | None:
        from botocore.exceptions import ClientError

        with self._answering():
            try:
                return self._client.head_object(Bucket=self._bucket, Key=self._key(name))
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") in ("NoSuchKey", "404", "NotFound"):
                    return None
                raise

    def written_at(self, name: str) -> float | None:
        found = self._head(name)
        return float(found["LastModified"].timestamp()) if found is not None else None

    def written(self, prefix: str = "") -> dict[str, float]:
        return {name: item["LastModified"].timestamp() for name, item in self._listed(prefix).items()}

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

    def stamps(self, prefix: str = "", *, after: str = "") -> dict[str, str]:
        return {name: f"{item['Size']} {item['ETag']}" for name, item in self._listed(prefix, after=after).items()}

    def _listed(self, prefix: str, *, after: str = "") -> dict[str, dict[str, Any]]:
        # With its slash: another folder whose name only begins alike is not this one.
        below = "/".join(part for part in (self._prefix, prefix.rstrip("/")) if part)
        below = f"{below}/" if below else ""
        cut = len(self._prefix) + 1 if self._prefix else 0
        start = {"StartAfter": self._key(after)} if after else {}
        with self._answering():
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=below, **start)
            found = {item["Key"][cut:]: item for page in pages for item in page.get("Contents", [])}
        return {name: found[name] for name in sorted(found) if name and not name.endswith("/")}
