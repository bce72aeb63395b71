"""What a folder has to add to a workspace: every file of it is taken, or left out for a reason that is told.

A folder holds one sub-folder per class, or predefined splits: `train/`, `test/` and perhaps `val/`, each of which does.
"""

from __future__ import annotations

import mimetypes
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from components import data_folder
from components.contracts.errors import DataError
from components.samples import OF_FILE_MANAGERS, SPLIT_OF, class_name_problem

_SPLITS = ("train", "val", "test")
_KINDS = mimetypes.MimeTypes()
"""The kinds of files that Python knows by their names, whatever else the system knows."""
_Rules = Callable[[str, list[str], list[str]], tuple[list[str], list[str]]]


@dataclass(frozen=True)
class LeftOut:
    """A file or folder that is no part of the new version, and why."""

    file: str
    reason: str


class SplitsUndecided(DataError):
    """Images are already split, and nobody said whether their test images are to be the frozen test."""


@dataclass(frozen=True)
class Incoming:
    """The files that a folder has to add."""

    files: list[tuple[str, Path]] = field(default_factory=list)
    """(class, file); of predefined splits those of train/ first: they keep their names where two splits share one."""
    left_out: list[LeftOut] = field(default_factory=list)
    test: frozenset[Path] | None = None
    """The files that are to be test for ever; None where nobody has split the folder."""


def incoming(folder: Path, data: Path, *, keep_splits: bool | None = None) -> Incoming:
    """What `folder` has to add to `data`; refused before anything is copied.

    A folder that is split keeps its test pictures (`keep_splits`), or is merged (False). Raises SplitsUndecided where nobody
    said which; DataError for a folder of another shape, for what cannot be read, and for names that no version can hold.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected one sub-folder per class, with images in it")
    given, there = folder.resolve(), data.resolve()
    if given == there or given.is_relative_to(there) or there.is_relative_to(given):
        raise DataError(
            f"{folder} is the workspace's own data folder, lies in it or holds it; to pin what is in {data}, "
            f"run `visionloop data add` without a folder"
        )
    reader = _Reader(folder, data, data_folder.ignore_rules(data))
    try:
        splits = _predefined(folder)
        if not splits and keep_splits:
            raise DataError(
                f"{folder} is not split; expected train/ and test/ (val/ may be there, too), each with one sub-folder per "
                f"class. Leave --keep-splits out, and visionloop chooses the test images"
            )
        if splits:
            reader.expect_nothing_beside(splits)
        if splits and keep_splits is None:
            raise SplitsUndecided(_choice(folder, splits))
        found = reader.of_splits(splits, keep=bool(keep_splits)) if splits else reader.of_classes(folder)
        unreadable = [path for _, path in found.files if not os.access(path, os.R_OK)]
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}; give read permission and run again") from error
    if unreadable:
        raise DataError(f"cannot read {unreadable[0]}: permission denied; give read permission and run again")
    return found


def _predefined(folder: Path) -> list[Path]:
    """The folders of predefined splits, train first and test last; none where the folder holds classes.

    A class may be called `train`: such a folder holds images, and that of a split holds folders.
    """
    named = [path for path in folder.iterdir() if path.is_dir() and path.name.casefold() in SPLIT_OF]
    if not any(inner.is_dir() and not inner.name.startswith(".") for path in named for inner in path.iterdir()):
        return []
    return sorted(named, key=lambda path: (_SPLITS.index(_split(path)), path.name))


def _split(path: Path) -> str:
    return SPLIT_OF[path.name.casefold()]


def _choice(folder: Path, splits: list[Path]) -> str:
    names = ", ".join(data_folder.shown(Path(path.name)) for path in splits)
    text = f"{data_folder.shown(folder)} is already split ({names} hold class folders). "
    if any(_split(path) == "test" for path in splits):
        text += "Keep its test images as the frozen test with --keep-splits, or "
    return f"{text}let visionloop choose the test images among all of it with --merge-splits"


class _Reader:
    """Reads class folders of one folder, as they would lie in `data`."""

    def __init__(self, folder: Path, data: Path, rules: _Rules) -> None:
        self.folder, self.data, self.rules = folder, data, rules
        self.left_out: list[LeftOut] = []

    def expect_nothing_beside(self, splits: list[Path]) -> None:
        """Raise DataError for other folders than those of splits; files beside them are left out, and told."""
        others: list[str] = []
        for path in self.taken(self.folder, self.data):
            name = data_folder.shown(Path(path.name))
            if not path.is_dir():
                self.left_out.append(LeftOut(name, "it lies beside the folders of the splits"))
            elif path not in splits:
                others.append(name)
        if others:
            raise DataError(
                f"{self.folder} holds other folders ({', '.join(others[:3])}) beside those of splits "
                f"({', '.join(path.name for path in splits)}); move each class into the splits, or the others elsewhere"
            )

    def of_splits(self, splits: list[Path], *, keep: bool) -> Incoming:
        """The classes of every split, merged; raises DataError where the test is kept and is of other classes than train."""
        files: list[tuple[str, Path]] = []
        test: set[Path] = set()
        classes: dict[str, set[str]] = {split: set() for split in _SPLITS}
        for path in splits:
            found = self.of_classes(path).files
            files += found
            classes[_split(path)] |= {label for label, _ in found}
            if _split(path) == "test":
                test |= {file for _, file in found}
        if not keep:
            return Incoming(files, self.left_out)
        for split in ("train", "test"):
            if not classes[split]:
                raise DataError(
                    f"{self.folder} has no {split}/; --keep-splits expects train/ and test/, each with one sub-folder per "
                    f"class. With --merge-splits visionloop chooses the test images"
                )
        for first, second in (("train", "test"), ("test", "train"), ("val", "train")):
            if only := sorted(classes[first] - classes[second]):
                shown = ", ".join(repr(label) for label in only[:3]) + (", ..." if len(only) > 3 else "")
                raise DataError(
                    f"{self.folder} has classes in {first}/ that {second}/ lacks ({shown}); expected the same class folders "
                    f"in train/ and test/: rename, add or remove some"
                )
        return Incoming(files, self.left_out, frozenset(test))

    def of_classes(self, place: Path) -> Incoming:
        """One sub-folder per class, with images in it."""
        labels = self.taken(place, self.data)
        loose = [path.name for path in labels if not path.is_dir()]
        classes = [path for path in labels if path.is_dir()]
        if not classes:
            parent = (
                f". If it is the folder of one class, name the folder that holds it: {os.path.normpath(place / '..')}"
                if loose
                else ""
            )
            raise DataError(
                f"{place} has no sub-folders; expected one per class, such as {place}/cat and {place}/dog"
                f"{parent}{_told(self.left_out)}"
            )
        loose = [name for name in loose if not self.no_picture(name)]
        if loose:
            raise DataError(
                f"{place} holds files beside the class folders ({', '.join(sorted(loose)[:3])}), whose class nobody can "
                f"tell; move each into the folder of its class, or out of {place}"
            )
        files: list[tuple[str, Path]] = []
        for path in classes:
            problem = None if (self.data / path.name).is_dir() else class_name_problem(path.name)
            if problem:
                raise DataError(f"{data_folder.shown(path)} cannot be the name of a class: {problem}; rename the folder")
            images = self.taken(path, self.data / path.name)
            deeper = [image for image in images if image.is_dir()]
            if deeper:
                raise DataError(
                    f"{data_folder.shown(deeper[0])} is a folder inside a class; images have to lie directly in their "
                    f"class folder"
                )
            if not images:
                shown = data_folder.shown(path.relative_to(self.folder))
                inside = [left for left in self.left_out if left.file.startswith(f"{shown}/")]
                raise DataError(
                    f"class {path.name!r} has no images in {place}; add some, or remove the empty folder{_told(inside)}"
                )
            files.extend((path.name, image) for image in images)
        return Incoming(files, self.left_out)

    def no_picture(self, name: str) -> bool:
        """Leave out a file beside the class folders whose name says that it is no picture, such as notes.txt."""
        kind, _ = _KINDS.guess_type(name)
        if kind is None or kind.startswith("image/"):
            return False
        self.left_out.append(LeftOut(data_folder.shown(Path(name)), "it lies beside the class folders"))
        return True

    def taken(self, place: Path, destination: Path) -> list[Path]:
        """Files and folders of `place` that are not left out, sorted; names are judged as if they lay in `destination`."""
        taken = []
        for path in sorted(place.iterdir()):
            name, reason = path.name, None
            if name.startswith("."):
                reason = "hidden"
            elif name.casefold() in OF_FILE_MANAGERS:
                reason = "left by a file manager"
            elif path.is_symlink() and not path.exists():
                reason = "a link that leads nowhere"
            elif not (path.is_file() or path.is_dir()):
                reason = "no regular file"
            else:
                data_folder.expect_utf8(path)
                folders, names = ([name], []) if path.is_dir() else ([], [name])
                kept = self.rules(str(destination.absolute()), folders, names)
                reason = None if any(kept) else "the workspace's .dvcignore leaves it out of versions"
            if reason is None:
                taken.append(path)
            else:
                is_folder = path.is_dir() and not path.is_symlink()
                shown = data_folder.shown(path.relative_to(self.folder)) + ("/" if is_folder else "")
                self.left_out.append(LeftOut(shown, reason))
        return taken


def _told(left_out: list[LeftOut]) -> str:
    """The first files that are left out, as the end of an error."""
    return "".join(f"; {left.file} is left out: {left.reason}" for left in left_out[:3])
