"""Data commands: bring images into a workspace, pin them as a version, and get them back."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from components import dataversions, plugins
from components.contracts import DataDiffers, DataError, DataVersion, Progress, Source, UndecodableImage, counted, silent
from components.formats import PINNED, Accepted, check_size, refusal
from components.images import check, decode, in_threads, pixel_digest
from components.samples import image_files
from components.splitting import TestLedger
from components.store import sha256_file
from flows.run import Workspace

DEFAULT_TEST_SHARE = 0.2
_BY_SETTING = "VISIONLOOP_FORMATS, VISIONLOOP_MAX_PIXELS or VISIONLOOP_MAX_IMAGE_MB, which serving needs too"


@dataclass(frozen=True)
class Added:
    """What `data add` did."""

    version: DataVersion
    num_copied: int
    num_already_there: int
    num_new_test: int
    undecodable: tuple[str, ...]
    refused: dict[str, str]
    """Files that were not copied, as serving would refuse them, and why; by class and name."""
    class_counts: dict[str, int]


def add(
    workspace: Workspace,
    folder: Path | None,
    *,
    test_share: float | None,
    accepted: Accepted = PINNED,
    progress: Progress = silent,
) -> Added:
    """Copy `folder` (one sub-folder per class) into data/, freeze the side of every new picture, pin the version.

    What serving would refuse by `accepted` is left out. Raises DataError when that is everything, or when it lies in data/
    and is not pinned yet.

    Without a folder, what lies in data/ is pinned as it is. Nothing is removed or overwritten; a run that is killed leaves
    the old version pinned, and running again completes it.
    """
    incoming, refused = _sorted_out(_class_files(folder), accepted) if folder is not None else ({}, {})
    root = workspace.root
    ledger_path = root / dataversions.TEST_LEDGER
    first = not ledger_path.exists()
    if first and not dataversions.adoptable(root):
        raise DataError(f"{ledger_path} is missing; restore it with `git checkout -- {ledger_path.name}`")
    ledger = TestLedger(test_share or DEFAULT_TEST_SHARE, {}) if first else TestLedger.read(ledger_path)
    if not first and test_share is not None and test_share != ledger.test_share:
        raise DataError(
            f"the test share of this data set is frozen at {ledger.test_share}; "
            f"leave --test-share out, or start another workspace"
        )
    copied, there = _copy(incoming, workspace.data, scratch=workspace.state / "tmp")
    if not workspace.data.is_dir():
        raise DataError(f"{workspace.data} is not there; name a folder: `visionloop data add FOLDER`")
    everything = image_files(workspace.data)
    # Every picture is looked at, not only those DVC calls new: the ledger must not depend on what DVC's cache still holds.
    touched = [path for paths in everything.values() for path in paths]
    undecodable: list[str] = []
    new_but_refused: list[str] = []
    pictures: list[tuple[str, str]] = []
    looked = in_threads(lambda path: _picture(path, accepted), touched, progress=progress)
    for path, (picture, why) in zip(touched, looked, strict=True):
        name = path.relative_to(workspace.data).as_posix()
        if picture is None:
            undecodable.append(name)
        else:
            pictures.append((picture, path.parent.name))
        if why and picture is not None and picture not in ledger.members:
            new_but_refused.append(f"{name}: {why}")
    if new_but_refused:
        raise DataError(
            f"{len(new_but_refused)} new pictures in {workspace.data} would be refused by serving "
            f"({'; '.join(new_but_refused[:3])}); convert or remove them, or accept them by {_BY_SETTING}. "
            f"Nothing was pinned"
        )
    extended = ledger.extended(pictures)
    extended.write(ledger_path)
    version = dataversions.pin(root)
    return Added(
        version=version,
        num_copied=copied,
        num_already_there=there,
        num_new_test=sum(extended.members.values()) - sum(ledger.members.values()),
        undecodable=tuple(sorted(undecodable)),
        refused=refused,
        class_counts={label: len(paths) for label, paths in everything.items()},
    )


def ensure(workspace: Workspace, source: str | None) -> DataVersion:
    """The verified pinned version; an empty workspace whose recipe names a source is filled from it first.

    Raises DataDiffers when the bytes are not the pinned ones; what was there before is untouched.
    """
    if source is not None and not workspace.data.exists():
        pinned = dataversions.pinned(workspace.root)
        fetch(workspace, source)
        try:
            dataversions.keep(workspace.root)
            return pinned
        except DataDiffers as error:
            shutil.rmtree(workspace.data)
            raise DataDiffers(
                f"source {source!r} made other bytes than data.dvc pins ({pinned.dvc_hash}); they were not kept. "
                f"Install the locked versions (`make setup`). {error}"
            ) from error
    return dataversions.verify(workspace.root)


def fetch(workspace: Workspace, source: str) -> None:
    """Write the images of a source plug-in into data/, all or nothing."""
    member: Source = plugins.load("sources", source)
    scratch = workspace.state / "tmp" / uuid.uuid4().hex
    scratch.mkdir(parents=True)
    try:
        member.fetch(out=scratch)
        try:
            _class_files(scratch)
        except DataError as error:
            raise DataError(f"source {source!r} wrote no data set; nothing was kept. {error}") from error
        os.rename(scratch, workspace.data)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _class_files(folder: Path) -> dict[str, list[Path]]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected one sub-folder per class, with images in it")
    try:
        by_class = image_files(folder)
        loose = [path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
        deeper = [path for name in by_class for path in (folder / name).iterdir() if path.is_dir()]
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}; give read permission and run again") from error
    if not by_class:
        raise DataError(f"{folder} has no sub-folders; expected one per class, such as {folder}/cat and {folder}/dog")
    if loose:
        raise DataError(
            f"{folder} holds files beside the class folders ({', '.join(sorted(loose)[:3])}); move each into its class"
        )
    if deeper:
        raise DataError(f"{deeper[0]} is a folder inside a class; images have to lie directly in their class folder")
    empty = [name for name, paths in by_class.items() if not paths]
    if empty:
        raise DataError(f"class {empty[0]!r} has no images in {folder}; add some, or remove the empty folder")
    unreadable = [path for paths in by_class.values() for path in paths if not os.access(path, os.R_OK)]
    if unreadable:
        raise DataError(f"cannot read {unreadable[0]}: permission denied; give read permission and run again")
    return by_class


def _copy(incoming: dict[str, list[Path]], data: Path, *, scratch: Path) -> tuple[int, int]:
    copied = there = 0
    scratch.mkdir(parents=True, exist_ok=True)
    for label, paths in incoming.items():
        if not paths:
            continue
        (data / label).mkdir(parents=True, exist_ok=True)
        for path in paths:
            destination = data / label / path.name
            if destination.exists():
                digest = sha256_file(path)
                if sha256_file(destination) == digest:
                    there += 1
                    continue
                destination = destination.with_name(f"{path.stem}-{digest[:12]}{path.suffix}")
                if destination.exists():
                    there += 1
                    continue
            # Not beside the destination: a kill must not leave a file that becomes part of the version.
            temporary = scratch / uuid.uuid4().hex
            try:
                shutil.copyfile(path, temporary)
                os.replace(temporary, destination)
            finally:
                temporary.unlink(missing_ok=True)
            copied += 1
    return copied, there


def _sorted_out(incoming: dict[str, list[Path]], accepted: Accepted) -> tuple[dict[str, list[Path]], dict[str, str]]:
    """The files that serving would take, and the others with the reason; raises DataError when there are only others."""

    def reason(path: Path) -> str:
        try:
            check_size(path.stat().st_size, accepted)  # before a film is read whole
            check(path.read_bytes(), accepted)
        except UndecodableImage as error:
            return str(error)
        return ""

    files = [path for paths in incoming.values() for path in paths]
    reasons = {path: why for path, why in zip(files, in_threads(reason, files), strict=True) if why}
    if files and len(reasons) == len(files):
        raise DataError(
            f"none of the {len(files)} files is a picture that is accepted ({files[0]}: {reasons[files[0]]}); "
            f"convert them, or accept them by {_BY_SETTING}. Nothing was changed"
        )
    kept = {label: [path for path in paths if path not in reasons] for label, paths in incoming.items()}
    return kept, {f"{path.parent.name}/{path.name}": why for path, why in reasons.items()}


def _picture(path: Path, accepted: Accepted) -> tuple[str | None, str]:
    """The digest of a picture, None when it cannot be decoded, and why serving would refuse it."""
    content = path.read_bytes()
    try:
        picture = decode(content)
    except UndecodableImage as error:
        return None, str(error)
    return pixel_digest(picture)[:32], refusal(content, picture.width, picture.height, accepted)


def class_note(class_counts: dict[str, int], minimum: int) -> Iterable[str]:
    """What training will object to, said early."""
    if len(class_counts) < 2:
        yield "only one class so far: training needs at least two"
    for label, count in class_counts.items():
        if count < minimum:
            yield f"class {label!r} has {counted(count, 'image')}: training needs at least {minimum}"
