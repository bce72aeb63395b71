"""The files of a version on their way: to the remote, from it into `data/`, and from one place in `data/` to another.

Files that are replaced are replaced here, whole and verified first.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from components.contracts.errors import DataDiffers, DataError
from components.contracts.wording import counted
from components.data_folder import DATA, listing
from components.dataversions import keep, pinned
from components.dvc_cache import (
    count_missing,
    hash_of_file,
    hashes_of,
    is_kept,
    listing_file,
    mend_by,
    objects_of,
    pinned_folder,
    pinned_tree,
    replaced,
    tree_of,
)
from components.dvc_repository import STATE, opened, remote_url, transferring
from components.store import explained

if TYPE_CHECKING:
    from dvc.output import Output
    from dvc.repo import Repo


def push(root: Path) -> int:
    """Send the pinned version to the remote; returns how many objects were sent. Raises DataDiffers, DataError."""
    # DVC sends what its cache holds, and calls it a success when that is nothing.
    keep(root)
    with opened(root) as repo:
        remote = remote_url(repo)
        if remote is None:
            raise DataError("no remote is set; name one with `visionloop data remote URL` (a folder, or s3://bucket/prefix)")
        with transferring():
            sent = repo.cloud.push(objects_of(pinned_folder(repo)))
        if sent.failed:
            raise DataError(
                f"{counted(len(sent.failed), 'file')} could not be sent to {remote}, {len(sent.transferred)} sent; check "
                f"its free space and permissions, and run the command again: it sends what is missing"
            )
        return len(sent.transferred)


def pull(root: Path, *, force: bool = False) -> int:
    """Bring the pinned version into `data/`, from DVC's cache or the remote; returns how many files changed.

    The whole version is made and verified beside `data/` first; then the two change places in one step, so that whatever
    happens `data/` is either as it was or the pinned version. Where it cannot be moved as a whole (it is a link or a mount
    of its own), its files are replaced one by one, and a run that is killed there is completed by running it again.
    Raises DataError when neither cache nor remote has all of it, DataDiffers when files would be lost that are in no
    version and `force` was not given; `data/` is untouched then.
    """
    pinned(root)
    data, made = root / DATA, _beside(root)
    with opened(root) as repo:
        out = pinned_folder(repo)
        there = hashes_of(tree_of(repo, data, hash_name=out.hash_name)[1]) if data.is_dir() and any(data.iterdir()) else {}
        _fetch(repo, out)
        wanted = _wanted(out)
        if there == wanted:
            return 0
        lost = sorted(name for name, oid in there.items() if wanted.get(name) != oid and not is_kept(out, oid))
        if lost and not force:
            raise DataDiffers(
                f"this would lose {counted(len(lost), 'file')} of {data} that no version holds ({', '.join(lost[:3])}). To "
                f"keep what is there: `visionloop data add`. To drop it: `visionloop data pull --force`"
            )
        try:
            with explained("make the pinned version in", made):
                damaged = _make(out, wanted, there, data, made)
                if damaged:
                    # An object that is not what it is named after is no copy of anything; the remote may have a good one.
                    _mend(repo, out, damaged)
                    shutil.rmtree(made)
                    damaged = _make(out, wanted, there, data, made)
            if damaged:
                objects = ", ".join(sorted(f"{oid[:2]}/{oid[2:]}" for oid in damaged)[:3])
                told = f"DVC's cache has {counted(len(damaged), 'damaged file')} ({objects}) of the pinned version"
                remote = remote_url(repo)
                if remote is None:
                    raise DataError(
                        f"{told}, and no remote is set to fetch them from. {data} and the cache were not touched. Set the "
                        f"remote that it was pushed to with `visionloop data remote URL`"
                    )
                raise DataError(
                    f"{told}, and the remote {remote} has no whole copy of them. {data} and the cache were not touched. "
                    f"Remove these from the remote, where they are there, and run `visionloop data push` in a workspace "
                    f"that has the pinned version"
                )
            _put_in_place(made, data, wanted, there)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return sum(wanted.get(name) != there.get(name) for name in {*wanted, *there})


def moved(files: Mapping[str, str], moves: Mapping[str, str | None]) -> dict[str, str]:
    """The files of a version after `moves`: a new path for some, None for those that leave it."""
    after = {name: oid for name, oid in files.items() if name not in moves}
    for name, target in moves.items():
        if target is not None:
            assert target not in after, f"{target} is taken"
            after[target] = files[name]
    return after


def move(root: Path, before: Mapping[str, str], moves: Mapping[str, str | None]) -> None:
    """Let `data/` hold the files of a version after `moves`, in one step; nothing is pinned by it.

    `before` are the files of the version that is pinned. Their bytes are in DVC's cache, and whole, before one of them
    leaves `data/`. Where `data/` cannot be replaced as a whole (see `pull`), a run that is killed is completed by the same
    call. Raises DataDiffers for a file in `data/` that is neither of the version nor of what is to be made of it.
    """
    data, made = root / DATA, _beside(root)
    with opened(root) as repo:
        out = pinned_folder(repo)
        there = hashes_of(tree_of(repo, data, hash_name=out.hash_name)[1])
        wanted = moved(before, moves)
        strange = sorted(name for name, oid in there.items() if oid not in (before.get(name), wanted.get(name)))
        if strange:
            raise DataDiffers(f"{data} holds what no version does: {', '.join(strange[:3])}; see `visionloop data status`")
        if there == wanted:
            return
        mend_by(out, {oid: data / name for name, oid in there.items()})
        tree_of(repo, data, hash_name=out.hash_name, store=True)
        try:
            with explained("make the next version in", made):
                damaged = _make(out, wanted, there, data, made)
            if damaged:
                raise DataError(f"DVC's cache changed while it was read ({', '.join(sorted(damaged)[:3])}); run it again")
            _put_in_place(made, data, wanted, there)
        finally:
            shutil.rmtree(made, ignore_errors=True)


def _wanted(out: Output) -> dict[str, str]:
    tree = pinned_tree(out)
    assert tree is not None
    return hashes_of(tree)


def _fetch(repo: Repo, out: Output) -> None:
    """Bring what DVC's cache lacks of the pinned version from the remote; raises DataError unless it is whole then."""
    missing, total = count_missing(out)
    if not missing:
        return
    remote = remote_url(repo)
    if remote is None:
        raise DataError(
            f"DVC's cache lacks {missing} of the {counted(total, 'file')} of the pinned version ({out.hash_info.value}), "
            f"and no remote is set to fetch them from. {DATA}/ was not touched. Set the remote that it was pushed to with "
            f"`visionloop data remote URL`, or pin what is in {DATA}/ now with `visionloop data add`"
        )
    with transferring():
        if pinned_tree(out) is None and listing_file(out).exists():
            _mend(repo, out, {str(out.hash_info.value)})  # DVC would not replace a damaged one
        elif pinned_tree(out) is None:
            repo.cloud.pull([out.hash_info])
        if pinned_tree(out) is not None:
            repo.cloud.pull(objects_of(out))
    missing, total = count_missing(out)
    if missing:
        raise DataError(
            f"neither DVC's cache here nor the remote {remote} holds {missing} of the {counted(total, 'file')} of the "
            f"pinned version ({out.hash_info.value}). {DATA}/ was not touched. Run `visionloop data push` in the workspace "
            f"that has them, name another remote (`visionloop data remote URL`), or pin what {DATA}/ holds "
            f"(`visionloop data add`)"
        )


def _mend(repo: Repo, out: Output, damaged: set[str]) -> None:
    """Replace damaged objects of DVC's cache by the remote's, where that has them whole; the others stay as they are."""
    if remote_url(repo) is None:
        return
    with transferring():
        remote = repo.cloud.get_remote_odb(None, "pull", hash_name=out.hash_name)
        for oid in damaged:
            with contextlib.suppress(FileNotFoundError):
                replaced(out, oid, functools.partial(remote.fs.get_file, remote.oid_to_path(oid)))


def _make(out: Output, wanted: Mapping[str, str], there: Mapping[str, str], data: Path, made: Path) -> set[str]:
    """Write the wanted files, and what DVC ignores in `data`, into `made`; returns the objects whose bytes were wrong."""
    made.mkdir(parents=True)
    damaged = set()
    for name, oid in wanted.items():
        target = made / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if there.get(name) == oid and linked(data / name, target):
            continue
        shutil.copyfile(out.cache.oid_to_path(oid), target)
        if hash_of_file(out, target) != oid:
            damaged.add(oid)
    if data.is_dir():
        for path in listing(data).ignored:
            for file in [path] if not path.is_dir() or path.is_symlink() else path.rglob("*"):
                if file.is_dir() and not file.is_symlink():
                    continue
                target = made / file.relative_to(data)
                target.parent.mkdir(parents=True, exist_ok=True)
                if not linked(file, target):
                    shutil.copy2(file, target, follow_symlinks=False)
        shutil.copymode(data, made)
    return damaged


def _beside(root: Path) -> Path:
    """Where a version is made before it changes places with `data/`; what a killed call left there is removed."""
    scratch = root / STATE / "tmp"
    for stale in scratch.glob("pull-*"):
        shutil.rmtree(stale, ignore_errors=True)
    return scratch / f"pull-{uuid.uuid4().hex}"


def linked(source: Path, target: Path) -> bool:
    """Give a file a second name; False where the file system, or a boundary between two, does not allow it."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        return False
    return True


def _put_in_place(made: Path, data: Path, wanted: Mapping[str, str], there: Mapping[str, str]) -> None:
    if not os.path.lexists(data):
        os.rename(made, data)
        return
    if not data.is_symlink() and _exchanged(made, data):
        return
    for name, oid in wanted.items():
        if there.get(name) != oid:
            (data / name).parent.mkdir(parents=True, exist_ok=True)
            temporary = (data / name).with_name(f".{uuid.uuid4().hex}.tmp")
            shutil.copyfile(made / name, temporary)
            os.replace(temporary, data / name)
    for name in there.keys() - wanted.keys():
        (data / name).unlink()


def _exchanged(first: Path, second: Path) -> bool:
    """Let two folders change places in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0)
