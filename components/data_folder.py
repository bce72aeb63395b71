"""What lies in a data folder: classes, files that belong to none, and what DVC's ignore rules leave out of a version."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from components.contracts.errors import DataError
from components.contracts.wording import is_text

DATA = "data"


@dataclass(frozen=True)
class Listing:
    """The files of a version, as they lie in a data folder."""

    classes: dict[str, list[Path]]
    """Files directly in a class folder by class, sorted; hidden ones are not among them."""
    strays: list[Path]
    """Files of the version that belong to no class: beside the classes, deeper than a class, or hidden."""
    ignored: list[Path]
    """Files and folders that DVC's ignore rules leave out of the version."""

    @property
    def files(self) -> list[Path]:
        """Every file of the version, sorted."""
        return sorted([*(path for paths in self.classes.values() for path in paths), *self.strays])


def import_dvc() -> None:
    """Import DVC where standard output is the process's own.

    Its colour library remembers standard output as it was at the import, and writes an escape sequence there at the end of
    the process. A bar that is drawn puts a stand-in in its place, which would show that sequence as letters.
    """
    with contextlib.redirect_stdout(sys.__stdout__):
        import dvc  # noqa: F401 - whose import is meant


def ignore_rules(data: Path) -> Callable[[str, list[str], list[str]], tuple[list[str], list[str]]]:
    """DVC's own rule of what a version leaves out: (absolute folder under `data`, sub-folders, files) -> those that stay."""
    import_dvc()
    from dvc.fs import localfs
    from dvc.ignore import DvcIgnoreFilter

    try:
        rules: Callable[[str, list[str], list[str]], tuple[list[str], list[str]]] = DvcIgnoreFilter(
            localfs, str(data.parent.absolute())
        )
        rules(str(data.absolute()), [], [])
    except (OSError, UnicodeDecodeError, re.error) as error:
        raise DataError(f"{data.parent / '.dvcignore'} cannot be read ({error}); expected lines of text in UTF-8") from error
    return rules


def listing(data: Path) -> Listing:
    """What lies in a data folder, by the one rule that adding, validating, comparing and pinning share.

    Raises DataError for what no version can hold and nothing can read: links to folders or to nothing, special files, names
    that are not UTF-8, folders without read permission.
    """
    rules = ignore_rules(data)
    classes: dict[str, list[Path]] = {}
    strays: list[Path] = []
    ignored: list[Path] = []

    def stop(error: OSError) -> NoReturn:
        raise DataError(f"cannot read {error.filename}: {error.strerror}; give read permission and run again") from error

    for place, folders, names in os.walk(data.absolute(), onerror=stop):
        kept_folders, kept_names = rules(place, folders, names)
        ignored += [Path(place, name) for name in {*folders, *names} - {*kept_folders, *kept_names}]
        for path in (Path(place, name) for name in kept_folders):
            expect_utf8(path)
            if path.is_symlink():
                raise DataError(f"{shown(path)} is a link to a folder, which no version holds; put the folder itself there")
        for path in (Path(place, name) for name in kept_names):
            expect_utf8(path)
            if path.name == ".dvcignore":
                raise DataError(f"{shown(path)}: DVC takes rules from the workspace's .dvcignore only; move them there")
            if not path.is_file():
                kind = "a link to nothing" if path.is_symlink() else "no regular file"
                raise DataError(f"{shown(path)} is {kind}, which no version holds; remove it")
            label, *rest = path.relative_to(data.absolute()).parts
            if len(rest) == 1 and not label.startswith(".") and not rest[0].startswith("."):
                classes.setdefault(label, []).append(data / label / rest[0])
            else:
                strays.append(data.joinpath(label, *rest))
        folders[:] = kept_folders
    return Listing({label: sorted(paths) for label, paths in sorted(classes.items())}, sorted(strays), sorted(ignored))


def expect_utf8(path: Path) -> None:
    """Raises DataError for a name that a version, which is text, cannot hold."""
    try:
        os.fsencode(path.name).decode()
    except UnicodeDecodeError:
        raise DataError(f"{shown(path)}: the name is not UTF-8; rename it (`convmv` does many at once)") from None


def shown(path: Path) -> str:
    """A path as it can be printed anywhere, on one line: what is no text or no printable character is escaped."""
    return "".join(
        character if is_text(character) else "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
        for character in str(path)
    )
