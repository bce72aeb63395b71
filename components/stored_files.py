"""The files of any version, as far as they are here: which there are, and their bytes."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.contracts.errors import DataError
from components.data_folder import DATA
from components.dvc_cache import expect_inside, hashes_of, tree_of
from components.dvc_repository import opened, remote_url, traceless, transferring

if TYPE_CHECKING:
    from dvc.repo import Repo


@dataclass(frozen=True)
class Listed:
    """The files that a version names, as far as it is known here."""

    files: dict[str, str] | None
    """Hash of the bytes by path in `data/`; None where nobody here has the list."""
    why_not: str = ""


_LARGEST = 1 << 30
"""Bytes of a file that is still looked at; no picture that is accepted comes near it."""


class Objects:
    """The bytes of versions that are here: DVC's cache, and `data/` as it lies. Nothing but lists of files is fetched."""

    def __init__(self, root: Path, repo: Repo) -> None:
        self._root, self._repo = root, repo

    def now(self) -> tuple[str, int, dict[str, str]]:
        """DVC's hash of what lies in `data/`, its size in bytes, and its files."""
        meta, tree = tree_of(self._repo, self._root / DATA)
        return str(tree.hash_info.value), int(meta.size), hashes_of(tree)

    def listed(self, dvc_hash: str, hash_name: str) -> Listed:
        """The files of a version by its hash; the list alone is fetched from the remote where the cache lacks it."""
        path = Path(self._cache(hash_name).oid_to_path(dvc_hash))
        remote, trouble = remote_url(self._repo), ""
        if not path.is_file() and remote is not None and not traceless.get():
            from dvc_data.hashfile.hash_info import HashInfo

            try:
                with transferring():
                    self._repo.cloud.pull([HashInfo(hash_name, dvc_hash)])
            except Exception as error:  # of a library behind it: what is not here is told, and nothing else fails for it
                trouble = f" ({str(error) or type(error).__name__})"
        try:
            content = path.read_bytes()
        except OSError:
            where = f"neither DVC's cache nor the remote {remote}{trouble} has" if remote else "DVC's cache does not have"
            return Listed(None, f"{where} the list of files of {dvc_hash}")
        if f"{hashlib.md5(content, usedforsecurity=False).hexdigest()}.dir" != dvc_hash:
            return Listed(None, f"DVC's cache has a damaged list of files of {dvc_hash}; `visionloop data pull` mends it")
        return Listed(_listed_files(content))

    def read(self, path: str, oid: str, hash_name: str) -> bytes | str:
        """The bytes of a file of a version; a sentence where they are not here."""
        cached = Path(self._cache(hash_name).oid_to_path(oid))
        for place in (cached, self._root / DATA / path):
            try:
                content = place.read_bytes() if place.is_file() and place.stat().st_size <= _LARGEST else b""
            except OSError:
                continue
            if hashlib.md5(content, usedforsecurity=False).hexdigest() == oid:
                return content
        return "damaged in DVC's cache" if cached.is_file() and hash_name == "md5" else "not in DVC's cache"

    def _cache(self, hash_name: str) -> Any:
        return self._repo.cache.local if hash_name == "md5" else self._repo.cache.legacy


@contextlib.contextmanager
def objects(root: Path) -> Iterator[Objects]:
    """What is here of the bytes of versions."""
    with opened(root) as repo:
        yield Objects(root, repo)


def _listed_files(content: bytes) -> dict[str, str]:
    """Read DVC's list of a version's files; raises DataError for one that leads outside of `data/` or of the cache."""
    import json

    try:
        files = {str(entry["relpath"]): str(entry["md5"]) for entry in json.loads(content)}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"the list of files of a version is not one that DVC wrote ({type(error).__name__})") from error
    for name, oid in files.items():
        expect_inside(name, oid)
    return files
