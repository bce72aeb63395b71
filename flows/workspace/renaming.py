"""`data rename-class`: a class gets another name, and models that know it by the old one stay comparable.

The folder is renamed in one step, then the rename is pinned with the data. A command that is killed in between is completed
by running it again: files that are where the rename puts them are recognised by their bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from components import data_folder, dataversions, git, history, stored_files
from components.companions import PIN
from components.contracts.data import DataVersion, names_after
from components.contracts.errors import ConfigError, DataDiffers, DataError, UnknownName
from components.differences import class_counts, difference
from components.samples import alike, class_name_problem
from components.store import fsync_folder
from flows.workspace.workspace import Workspace


@dataclass(frozen=True)
class ClassRenamed:
    """A class under its new name, pinned."""

    version: DataVersion
    num_files: int
    was_done: bool
    """Whether it had that name, and the version said so, before."""


def rename_class(workspace: Workspace, old: str, new: str) -> ClassRenamed:
    """Rename the folder of a class and pin that as a version which says so.

    Raises ConfigError for a name that cannot be one or is taken, UnknownName for a class that is not there, DataDiffers
    where data/ is not the pinned version: other changes would go into the version unseen.
    """
    if old == new:
        raise ConfigError(f"{old!r} is its name already; give another one")
    problem = class_name_problem(new)
    if problem:
        raise ConfigError(f"{new!r} cannot be the name of a class: {problem}")
    with workspace.making_version("visionloop data rename-class"):
        pinned = history.pinned(workspace.root)
        if not workspace.data.is_dir():
            raise DataError(f"{workspace.data} is not there; `visionloop data pull` brings the pinned version")
        there = data_folder.listing(workspace.data).classes
        if old in there:
            _expect_free(workspace.data, new, [name for name in there if name != old])
            _expect_short(there[old], new)
            dataversions.verify(workspace.root)
            os.rename(workspace.data / old, workspace.data / new)
            fsync_folder(workspace.data)
        elif pinned.renamed[-1:] == ((old, new),) and new in there:
            git.stage(workspace.root, PIN)  # a kill may have come between the pin and this
            return ClassRenamed(dataversions.verify(workspace.root), len(there[new]), True)
        elif not _is_renamed(workspace, pinned, old, new):
            raise UnknownName("class", old, list(there))
        version = dataversions.pin(workspace.root, renamed=(old, new))
        return ClassRenamed(version, len(there.get(old) or there[new]), False)


def _expect_free(data: Path, new: str, others: list[str]) -> None:
    taken = next((name for name in others if alike(name) == alike(new)), None)
    if taken is not None:
        same = "is a class already" if taken == new else f"differs from the class {taken!r} only in how it is written"
        raise ConfigError(
            f"{new!r} {same}. To make one class of two, move the images into one folder and pin that with "
            f"`visionloop data add`: these are other labels and no other name"
        )
    folder = data / new
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there and is no class; move it away, or choose another name")


def _expect_short(files: list[Path], new: str) -> None:
    longest = max((path.parent.with_name(new) / path.name for path in files), key=lambda path: len(os.fsencode(path)))
    if len(os.fsencode(longest)) >= os.pathconf(files[0].parent, "PC_PATH_MAX"):
        raise ConfigError(f"{longest} would be too long a path for the workspace's disk; choose a shorter name")


def _is_renamed(workspace: Workspace, pinned: history.Version, old: str, new: str) -> bool:
    """Whether the rename of the pinned version's folder is all that data/ differs by."""
    with stored_files.objects(workspace.root) as objects:
        before = objects.listed(pinned.dvc_hash, pinned.hash_name)
        if before.files is None:
            raise DataError(f"it cannot be told whether {old!r} was a class: {before.why_not}")
        if old not in class_counts(before.files) or new in class_counts(before.files):
            return False
        found = difference(before.files, objects.now()[2], ((old, new),))
    if sum(found.counts.values()) > 1:
        raise DataDiffers(
            f"{workspace.data} differs from the pinned version by more than the rename of {old!r} "
            f"(`visionloop data diff` shows it); pin that by itself first, or bring the pinned version back with "
            f"`visionloop data pull --force`"
        )
    return [(one.old, one.new) for one in found.renamed_classes] == [(old, new)]


def names_of_today(workspace: Workspace) -> Callable[[str], str]:
    """What a class is called now that a label or a model's answer calls by an earlier name; a class of that name stays."""
    try:
        renames = dataversions.pinned(workspace.root).renamed
    except DataError:
        renames = ()
    classes = {folder.name for folder in workspace.data.glob("*") if folder.is_dir()} if renames else set()
    return lambda name: name if name in classes else names_after([name], renames)[0]
