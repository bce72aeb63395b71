"""The objects below s3://bucket/prefix: class folders, predefined splits of them, or files with a manifest at the top.

Endpoint, region and credentials come from the AWS environment, as for every AWS tool. A transfer that is killed, or whose
server went away, goes on: an object that is here is kept when it is the one that is listed, byte for byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pydantic import Field

from components.contracts.errors import ConfigError, DataError, RegistryUnavailable, SourceUnavailable
from components.contracts.progress import Progress, silent
from components.data_folder import shown
from components.foreign_files import MOST_PROBLEMS, Names, Quotas, receiving, refused, settle
from components.objects import s3_client
from components.store import explained, sha256_file

_CHUNK = 1 << 18
_ATTEMPTS = 3
"""For an object whose bytes do not all come, or come as others; what gets no answer is asked again by botocore."""
_MD5 = re.compile(r"[0-9a-f]{32}")
_SCHEME = "s3://"
_REFUSED = {
    "NoSuchBucket": "there is no such bucket; check its name, and AWS_ENDPOINT_URL where it is not Amazon's",
    "AccessDenied": "access is denied; the credentials need s3:ListBucket for the bucket and s3:GetObject for its objects",
    "InvalidAccessKeyId": "the access key is not known there; check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "the secret is not that of the access key; check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the credentials have expired; sign in again",
    "PermanentRedirect": "the bucket is in another region; name it by AWS_DEFAULT_REGION",
    "AuthorizationHeaderMalformed": "the bucket is in another region; name it by AWS_DEFAULT_REGION",
    "NoSuchKey": "an object is gone since it was listed; run the same command again, it lists anew",
    "PreconditionFailed": "an object is another one since it was listed; run the same command again, it lists anew",
    "InvalidObjectState": "an object is in an archive class of storage; restore it there first",
}
_ALSO = {"403": "AccessDenied", "404": "NoSuchKey", "412": "PreconditionFailed", "301": "PermanentRedirect"}
"""Codes of servers and answers that have no words."""


class Source(Quotas):
    """Images in an S3 bucket, or in that of another server that speaks S3."""

    resumes: ClassVar[bool] = True

    address: str = Field(pattern=r"^s3://[^/]+(/.*)?$")
    """s3://bucket/prefix."""
    anonymous: bool = False
    """Whether to ask without credentials, as public buckets are asked."""
    workers: int = Field(default=16, ge=1, le=128)
    """Objects that are transferred at once."""

    @classmethod
    def takes(cls, given: str) -> bool:
        """Whether it is an address of S3."""
        return given.startswith(_SCHEME)

    def fetch(self, *, out: Path, progress: Progress = silent) -> None:
        """Bring every object into `out`; raises SourceUnavailable, and DataError that lists keys that cannot be taken."""
        bucket, _, prefix = self.address.removeprefix(_SCHEME).partition("/")
        folder = receiving(out)
        with _told(self.address):
            client = self._client()
            objects = self._listed(client, bucket, prefix.strip("/"))
        transfer = _Transfer(client, bucket, folder, self.address, progress)
        transfer.leave_only(objects)
        transfer.bring(objects, self.workers)
        settle(out, self.address, keep=True)

    def _client(self) -> Any:
        config: dict[str, Any] = {"max_pool_connections": self.workers, "response_checksum_validation": "when_supported"}
        if self.anonymous:
            from botocore import UNSIGNED

            config["signature_version"] = UNSIGNED
        return s3_client(self.address, **config)

    def _listed(self, client: Any, bucket: str, prefix: str) -> list[_Object]:
        """All objects below the prefix; raises DataError for names that no file can have, and for too many or too large."""
        below = f"{prefix}/" if prefix else ""
        names, objects, total = Names(), [], 0
        problems: list[str] = []
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=below):
            for item in page.get("Contents", []):
                key, size = item["Key"], int(item["Size"])
                name = key[len(below) :]
                if size == 0 and (not name or name.endswith("/")):
                    continue  # what consoles make for a folder
                problem = names.problem(name)
                if problem and len(problems) < MOST_PROBLEMS:
                    problems.append(f"{shown(Path(key))}: {problem}")
                total += size
                self.check_file(size, shown(Path(key)), self.address)
                self.check_total(total, self.address)
                objects.append(_Object(name, key, size, item["ETag"]))
                self.check_count(max(len(objects), len(names)), self.address)
        if problems:
            raise refused(self.address, problems, "Give them other keys, or name a prefix without them")
        if not objects:
            raise DataError(
                f"there is nothing below {self.address}/; expected a folder per class, or a manifest. Check the prefix, "
                f"which is compared letter by letter; of an archive in a bucket, download it and add the file"
            )
        return objects


class _Object(NamedTuple):
    """An object as it is listed."""

    name: str
    """Relative to the prefix."""
    key: str
    size: int
    etag: str
    """With its quotes. The md5 of the bytes where it looks like one, unless the object was uploaded in parts or is
    encrypted by a key of one's own."""


class _Transfer:
    """Brings objects into a folder, several at a time, and notes each beside it once it is whole."""

    def __init__(self, client: Any, bucket: str, folder: Path, address: str, progress: Progress) -> None:
        self._client, self._bucket, self._folder, self._address = client, bucket, folder, address
        self._progress = progress
        self._notes = folder.with_name("transferred.jsonl")
        self._stop, self._lock = threading.Event(), threading.Lock()

    def leave_only(self, objects: list[_Object]) -> None:
        """Remove what an earlier call brought and is not listed any more, and what it had not finished."""
        listed = {listed.name for listed in objects}
        for part in self._folder.parent.glob("*.part"):
            part.unlink()
        for place, folders, files in os.walk(self._folder, topdown=False):
            for file in files:
                path = Path(place, file)
                if path.relative_to(self._folder).as_posix() not in listed:
                    path.unlink()
            for inner in folders:
                with contextlib.suppress(OSError):  # which is not empty
                    Path(place, inner).rmdir()

    def bring(self, objects: list[_Object], workers: int) -> None:
        """Transfer what is not here; raises SourceUnavailable, StoreError for a full disk."""
        known = self._noted()
        remaining = iter(objects)
        done = 0
        with self._notes.open("a", encoding="utf-8") as notes, ThreadPoolExecutor(workers) as pool:

            def work() -> None:
                nonlocal done
                while not self._stop.is_set():
                    with self._lock:
                        listed = next(remaining, None)
                    if listed is None:
                        return
                    note = None
                    if not self._is_here(listed, known.get(listed.name)):
                        note = [listed.name, listed.size, listed.etag, self._bring(listed)]
                    with self._lock:
                        if note is not None:
                            notes.write(json.dumps(note) + "\n")
                            notes.flush()
                        done += 1
                        self._progress(done, len(objects))

            futures = [pool.submit(work) for _ in range(workers)]
            try:
                ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self._stop.set()
        try:
            for future in ended:
                future.result()
        except SourceUnavailable as error:
            kept = f"{done} of {len(objects)} objects are here and are kept; run the same command again, it goes on"
            raise SourceUnavailable(f"{error}. {kept}") from error

    def _noted(self) -> dict[str, tuple[int, str, str]]:
        """Size, ETag and sha256 of what earlier calls brought; a line that a kill cut short says nothing."""
        noted = {}
        with contextlib.suppress(FileNotFoundError):
            for line in self._notes.read_bytes().splitlines():
                with contextlib.suppress(ValueError, TypeError):
                    name, size, etag, sha256 = json.loads(line)
                    noted[name] = (size, etag, sha256)
        return noted

    def _is_here(self, listed: _Object, known: tuple[int, str, str] | None) -> bool:
        path = self._folder / listed.name
        if not path.is_file() or path.stat().st_size != listed.size:
            return False
        if known is not None:
            return known == (listed.size, listed.etag, sha256_file(path))
        md5 = listed.etag.strip('"')
        with path.open("rb") as file:
            return bool(_MD5.fullmatch(md5)) and hashlib.file_digest(file, _md5).hexdigest() == md5

    def _bring(self, listed: _Object) -> str:
        """Transfer one object, whole and verified or not at all; returns its sha256."""
        part = self._folder.with_name(f"{uuid.uuid4().hex}.part")
        target = self._folder / listed.name
        address = f"{_SCHEME}{self._bucket}/{shown(Path(listed.key))}"
        try:
            with explained("transfer into", self._folder):
                for _ in range(_ATTEMPTS):
                    with _told(address):
                        digest, problem = self._received(listed, part)
                    if not problem:
                        target.parent.mkdir(parents=True, exist_ok=True)
                        os.replace(part, target)
                        return digest
            raise SourceUnavailable(f"{address} {problem}, {_ATTEMPTS} times")
        finally:
            part.unlink(missing_ok=True)

    def _received(self, listed: _Object, part: Path) -> tuple[str, str]:
        """The sha256 of what came of an object, and what is wrong with it."""
        from botocore.exceptions import FlexibleChecksumError, IncompleteReadError, ReadTimeoutError, ResponseStreamingError

        answer = self._client.get_object(Bucket=self._bucket, Key=listed.key, IfMatch=listed.etag)
        sha256, md5, size = hashlib.sha256(), _md5(), 0
        try:
            with part.open("wb") as file:
                for chunk in answer["Body"].iter_chunks(_CHUNK):
                    if self._stop.is_set():
                        raise SourceUnavailable(f"{self._address}: stopped")
                    size += len(chunk)
                    if size > listed.size:
                        return "", f"has more than the {listed.size} bytes that are listed"
                    for digest in (sha256, md5):
                        digest.update(chunk)
                    file.write(chunk)
        except FlexibleChecksumError:
            return "", "came with other bytes than its checksum is of"
        except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
            return "", f"broke off after {size} of {listed.size} bytes"
        if size != listed.size:
            return "", f"has {size} bytes, and {listed.size} are listed"
        expected = listed.etag.strip('"')
        is_md5 = _MD5.fullmatch(expected) and "kms" not in answer.get("ServerSideEncryption", "")
        if is_md5 and "SSECustomerAlgorithm" not in answer and md5.hexdigest() != expected:
            return "", "came with other bytes than its ETag is of"
        return sha256.hexdigest(), ""


def _md5() -> Any:
    return hashlib.md5(usedforsecurity=False)


@contextlib.contextmanager
def _told(address: str) -> Iterator[None]:
    """What S3, or the way there, answers becomes SourceUnavailable that says what to do."""
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        CredentialRetrievalError,
        NoCredentialsError,
        PartialCredentialsError,
        ProfileNotFound,
    )

    try:
        yield
    except RegistryUnavailable as error:
        raise SourceUnavailable(str(error)) from error
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        known = _REFUSED.get(_ALSO.get(code, code))
        if known is None:
            raise SourceUnavailable(f"{address} does not answer: {error}; run the same command again") from error
        raise SourceUnavailable(f"{address}: {known}") from error
    except (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, ProfileNotFound) as error:
        raise SourceUnavailable(
            f"{address}: no usable credentials ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE. "
            f"A public bucket needs none: `--source-setting anonymous=true`"
        ) from error
    except BotoCoreError as error:
        raise SourceUnavailable(
            f"{address} does not answer ({str(error).splitlines()[0]}); check the network and AWS_ENDPOINT_URL, and run the "
            f"same command again"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{address}: {error}; check AWS_ENDPOINT_URL") from error
