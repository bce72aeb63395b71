"""Kept images behind one address, a folder or S3, and the record of those that were erased.

    aa/aabb...      the bytes of an image, by their sha256
    erased.jsonl    a hash-chained line for each erasure

An erasure is recorded first, then the image is removed; an erased image is never kept again, and `verify` proves that it is
not there.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, TypeVar

from components.contracts.errors import ConfigError, TamperedArtefact
from components.contracts.records import canonical_json, sha256_text
from components.formats import PINNED
from components.objects import Objects, open_objects

_DIGEST = re.compile(r"[0-9a-f]{64}")
_HALF_WRITTEN = re.compile(r"([0-9a-f]{2})/\.\1[0-9a-f]{62}\.[0-9a-f]{32}\.tmp")
"""What a writer to a folder that was killed leaves of an image."""
_ERASED = "erased.jsonl"
_FIRST = "0" * 64
_MAX_ERASURES_BYTES = 256 << 20
_AT_ONCE = 16
"""Requests that wait for an answer over a network."""
_FEW = 500
"""Images that are asked for one by one there; more are looked up in a list of all, a thousand a request."""
_ItemT = TypeVar("_ItemT")
_FoundT = TypeVar("_FoundT")


class CaptureStore:
    """The kept images of one address. Threads may share it."""

    def __init__(self, url: str, *, private: bool = False) -> None:
        self.url = url
        self._objects: Objects = open_objects(url, private=private)
        self._is_near = not url.startswith("s3://")
        self._known: tuple[str | None, Mapping[str, dict[str, Any]]] = (None, {})

    def place(self, sha256: str) -> str:
        """Where an image lies, or would, for people; raises ConfigError for what is no sha256."""
        return f"{self.url.rstrip('/')}/{_name_of(sha256)}"

    def names(self) -> set[str]:
        """Digests of all images that are kept."""
        return set(filter(None, map(_digest_of, self._objects.stamps())))

    def among(self, sha256s: Collection[str]) -> set[str]:
        """Those of some images that are kept."""
        if not self._is_near and len(sha256s) > _FEW:
            return self.names() & set(sha256s)
        wanted = [sha256 for sha256 in set(sha256s) if _DIGEST.fullmatch(sha256)]
        return {sha256 for sha256, there in zip(wanted, self._each(self.has, wanted), strict=True) if there}

    def has(self, sha256: str) -> bool:
        """Whether an image is kept."""
        return self._objects.stamp(_name_of(sha256)) is not None

    def read(self, sha256: str) -> bytes | None:
        """The bytes that are kept as an image, whatever they are by now; None where there are none."""
        return self._objects.read(_name_of(sha256), most=PINNED.max_bytes)

    def write(self, sha256: str, data: bytes) -> None:
        """Keep the bytes of an image that was not erased."""
        self._objects.write(_name_of(sha256), data)

    def digest(self, sha256: str) -> str | None:
        """sha256 of the bytes that are kept as an image."""
        return self._objects.digest(_name_of(sha256))

    def remove(self, sha256: str, *, for_good: bool = False) -> None:
        """Keep an image no longer; `for_good` with all versions of it that the address keeps."""
        self._objects.remove(_name_of(sha256), for_good=for_good)

    def sweep(self, retain_days: float, now: float | None = None) -> int:
        """Remove images that were kept for longer; returns how many."""
        oldest = (now if now is not None else time.time()) - retain_days * 86400
        old = [
            name
            for name, at in self._objects.written().items()
            if at < oldest and (_digest_of(name) or _HALF_WRITTEN.fullmatch(name))
        ]

        def forget(name: str) -> bool:
            # Another server may have removed it since the list was made, and have sent it anew.
            at = self._objects.written_at(name)
            is_old = at is not None and at < oldest
            if is_old:
                self._objects.remove(name)
            return is_old

        return sum(self._each(forget, old))

    def erase(self, sha256: str, *, by: str, reason: str, found: bool | None = None) -> dict[str, Any]:
        """Remove an image for good and record it, and whether it was `found`; erasing again is the same record.

        Raises ConfigError.
        """
        name = _name_of(sha256)
        if not by.strip() or not reason.strip():
            raise ConfigError("an erasure needs --as and --reason, for whoever has to prove it later")
        told = {
            "image_sha256": sha256,
            "by": by.strip(),
            "reason": reason.strip(),
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        # The record first: a kill in between leaves an image that must not be there, which `verify` reports and a second
        # erasure removes.
        record = self._record(told, found=self.has(sha256) if found is None else found)
        self._objects.remove(name, for_good=True)
        return record

    def _record(self, told: Mapping[str, Any], *, found: bool) -> dict[str, Any]:
        recorded: list[dict[str, Any]] = []

        def change(current: bytes | None) -> bytes | None:
            lines = self._chain(current)
            known = next((line for line in lines if line["image_sha256"] == told["image_sha256"]), None)
            body = {**told, "found": found, "previous": lines[-1]["hash"] if lines else _FIRST}
            recorded[:] = [known or body | {"hash": sha256_text(canonical_json(body))}]
            return None if known else _written([*lines, *recorded])

        self._objects.swap(_ERASED, change)
        return recorded[0]

    def take_over(self, lines: Sequence[Mapping[str, Any]]) -> int:
        """Record erasures that another store has on record, and remove what is kept of them here; returns how many.

        Where none is on record yet the chain comes out as the other's: its head may have been written down.
        """
        known = self.erased() if lines else {}
        missing = [line for line in lines if line["image_sha256"] not in known]
        for line in missing:
            told = {name: line[name] for name in ("image_sha256", "by", "reason", "at")}
            # Before as well: what is on record here is not taken over again, and a kill in between would leave the image.
            self.remove(line["image_sha256"], for_good=True)
            self._record(told, found=line["found"])
            self.remove(line["image_sha256"], for_good=True)
        return len(missing)

    def erased(self) -> Mapping[str, dict[str, Any]]:
        """The records of erasures by image; raises TamperedArtefact for a chain that was changed."""
        stamp = self._objects.stamp(_ERASED)
        if stamp is None:
            return {}
        known, records = self._known
        if stamp != known:
            records = {line["image_sha256"]: line for line in self.lines()}
            self._known = stamp, records
        return records

    def lines(self) -> list[dict[str, Any]]:
        """The records of erasures in their order; raises TamperedArtefact."""
        return self._chain(self._objects.read(_ERASED, most=_MAX_ERASURES_BYTES))

    def erasures(self) -> tuple[int, str]:
        """How many images were erased, and the hash of the last record.

        The chain shows records that were changed or left out, not that its end was cut off: who kept this figure sees that.
        """
        lines = self.lines()
        return len(lines), lines[-1]["hash"] if lines else _FIRST

    def verify(self, erased_elsewhere: Collection[str] = ()) -> list[str]:
        """What is wrong: erased images that are there, and files that are not the image they are named after."""
        erased = {line["image_sha256"] for line in self.lines()} | set(erased_elsewhere)

        def problem(sha256: str) -> str:
            if sha256 in erased:
                return f"{sha256} was erased and is there; erase it again"
            return "" if self.digest(sha256) in (sha256, None) else f"{sha256} is not the image it is named after"

        return list(filter(None, self._each(problem, sorted(self.names()))))

    def _each(self, function: Callable[[_ItemT], _FoundT], items: Iterable[_ItemT]) -> list[_FoundT]:
        """`map`, many at once where most of the time is waiting for a network."""
        if self._is_near:
            return list(map(function, items))
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(function, items))

    def _chain(self, data: bytes | None) -> list[dict[str, Any]]:
        previous, found = _FIRST, []
        try:
            for line in (data or b"").decode().splitlines():
                record = json.loads(line)
                body = {name: value for name, value in record.items() if name != "hash"}
                if body["previous"] != previous or sha256_text(canonical_json(body)) != record["hash"]:
                    raise ValueError("a record does not follow the one before")
                previous = record["hash"]
                found.append(record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TamperedArtefact(
                f"{self.url.rstrip('/')}/{_ERASED} was changed by hand; bring it back from a backup (`visionloop restore`)"
            ) from error
        return found


def is_image_of(data: bytes, sha256: str) -> bool:
    """Whether these are the bytes of the image of this name."""
    return hashlib.sha256(data).hexdigest() == sha256


def _written(lines: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(dict(line)) + "\n" for line in lines).encode()


def _name_of(sha256: str) -> str:
    if not _DIGEST.fullmatch(sha256):
        raise ConfigError(f"{sha256[:80]!r} is not the sha256 of an image: 64 hex digits")
    return f"{sha256[:2]}/{sha256}"


def _digest_of(name: str) -> str | None:
    """The image that an object of this name is; None for what is none."""
    path = PurePosixPath(name)
    return path.name if _DIGEST.fullmatch(path.name) and str(path.parent) == path.name[:2] else None
