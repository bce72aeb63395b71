"""DVC's hashes of a data folder, and what its cache holds of the pinned version: whole, damaged or not at all."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.companions import PIN
from components.contracts.errors import DataError
from components.contracts.wording import counted
from components.data_folder import DATA, listing
from components.store import explained

if TYPE_CHECKING:
    from dvc.output import Output
    from dvc.repo import Repo
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

_OID = re.compile(r"[0-9a-f]{32}")


def pinned_folder(repo: Repo) -> Output:
    # Not find_outs_by_path: it builds the graph of every output in the repository first.
    return repo.stage.load_one(str(Path(repo.root_dir, PIN))).outs[0]


def tree_of(repo: Repo, data: Path, *, hash_name: str = "md5", store: bool = False) -> tuple[Any, Tree]:
    """DVC's (meta, tree) of a data folder, which is exactly what `listing` lists; with `store`, in the cache too."""
    from dvc_data.hashfile.build import build
    from dvc_data.hashfile.transfer import transfer

    cache = repo.cache.local if hash_name == "md5" else repo.cache.legacy
    expected = {path.relative_to(data).parts for path in listing(data).files}
    if not expected:
        raise DataError(
            f"{data} holds no file that a version could hold: it is empty, or {data.parent / '.dvcignore'} leaves out "
            f"what is there. Add images with `visionloop data add FOLDER`"
        )
    # A folder of our own making lies where a person's rules may leave everything out.
    rules = repo.dvcignore if data == Path(repo.root_dir, DATA) else None
    try:
        staging, meta, tree = build(cache, str(data), repo.fs, hash_name, dry_run=not store, ignore=rules)
        found = {key for key, _, _ in tree}
        if found != expected:
            differing = sorted("/".join(key) for key in found ^ expected)
            raise DataError(f"{data} changed while it was read ({', '.join(differing[:3])}); run the command again")
        if store:
            with explained("keep the data in", Path(repo.root_dir, ".dvc", "cache")):
                failed = transfer(staging, cache, {tree.hash_info}, shallow=False, hardlink=False).failed
            if failed:
                raise DataError(
                    f"{counted(len(failed), 'file')} of {data} could not be copied into DVC's cache; run the command again"
                )
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}; mend it, run it again") from error
    return meta, tree


def pinned_tree(out: Output) -> Tree | None:
    """The files of the pinned version, as its listing in DVC's cache names them; None when the cache lacks it whole.

    Raises DataError for a listing that would lead outside of `data/` or of the cache.
    """
    from dvc_data.hashfile.tree import Tree

    try:
        content = listing_file(out).read_bytes()
    except FileNotFoundError:
        return None
    # DVC reads whatever lies there. A remote, or a disk, may have put something else in the place.
    if f"{hashlib.md5(content, usedforsecurity=False).hexdigest()}.dir" != out.hash_info.value:
        return None
    tree = Tree.load(out.cache, out.hash_info)
    for name, oid in hashes_of(tree).items():
        expect_inside(name, oid)
    return tree


def expect_inside(name: str, oid: str) -> None:
    if not {"", ".", ".."}.isdisjoint(name.split("/")) or not _OID.fullmatch(oid):
        raise DataError(
            f"the list of files that {PIN} names is not one that DVC wrote ({name!r}, {oid!r}); nothing was read or "
            f"written by it. Ask who made this version, or bring an earlier {PIN} back with git"
        )


def hash_of_file(out: Output, path: Path) -> str:
    from dvc_data.hashfile.hash import hash_file

    return str(hash_file(str(path), out.fs, out.hash_name)[1].value)


def listing_file(out: Output) -> Path:
    return Path(out.cache.oid_to_path(str(out.hash_info.value)))


def hashes_of(tree: Tree) -> dict[str, str]:
    """Content hash by path (relative to data/)."""
    return {"/".join(key): str(found.value) for key, _, found in tree if found is not None}


def count_missing(out: Output) -> tuple[int, int]:
    """How many files of the pinned version DVC's cache lacks, of how many; all of them when its listing is missing."""
    before = pinned_tree(out)
    if before is None:
        total = int(out.meta.nfiles or 0)
        return total, total
    wanted = set(hashes_of(before).values())
    absent = {oid for oid in wanted if not Path(out.cache.oid_to_path(oid)).is_file()}
    return sum(oid in absent for oid in hashes_of(before).values()), len(before)


def objects_of(out: Output) -> set[HashInfo]:
    """The pinned version's listing and, where the cache has it, every file that it names."""
    before = pinned_tree(out)
    files = [] if before is None else [found for _, _, found in before if found is not None]
    return {out.hash_info, *files}


def mend_by(out: Output, paths: Mapping[str, Path]) -> None:
    """Replace damaged objects of DVC's cache by the files that hold their bytes.

    DVC takes what lies in its cache for what it is named after, and would send it.
    """
    for oid, path in paths.items():
        damaged = Path(out.cache.oid_to_path(oid)).is_file() and not is_kept(out, oid)
        if damaged and not replaced(out, oid, functools.partial(shutil.copyfile, path)):
            raise DataError(f"{path} changed while it was read; run the command again")


def replaced(out: Output, oid: str, bring: Callable[[str], object]) -> bool:
    """Let an object of DVC's cache be what `bring` writes, once that is whole; False where it is something else."""
    cached = Path(out.cache.oid_to_path(oid))
    proposed = cached.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        bring(str(proposed))
        if hash_of_file(out, proposed) != oid.removesuffix(".dir"):
            return False
        proposed.chmod(0o444)
        os.replace(proposed, cached)
    finally:
        proposed.unlink(missing_ok=True)
    return True


def is_kept(out: Output, oid: str) -> bool:
    """Whether DVC's cache has an object, and whole."""
    cached = Path(out.cache.oid_to_path(oid))
    return cached.is_file() and hash_of_file(out, cached) == oid
