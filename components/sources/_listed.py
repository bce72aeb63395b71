"""Files that a list names, with their classes: what manifests and exports of labelling tools share.

Every entry is checked before anything is written, and all problems are told by place. Nothing outside the list's root is
reached. What is written are links to the files, so that nothing is copied twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from components.attributes import LEFT_OUT, Attributes, write_said
from components.contracts.errors import DataError
from components.contracts.progress import Progress
from components.contracts.wording import counted, is_text
from components.samples import SPLIT_OF, class_name_problem

MOST_PROBLEMS = 100
"""How many problems are told one by one."""


_LONGEST_TOLD = 200
"""Characters of a path that an error shows."""


class _Entry(NamedTuple):
    place: int
    file: str
    """Where it lies, without links."""
    name: str
    """As the list says it."""
    label: str
    split: str
    attributes: Attributes


class Listed:
    """The entries of one list, and what is wrong with it; a place is a line, or whatever `noun` is."""

    def __init__(self, path: Path, root: Path | None, *, noun: str, classes: Sequence[str] = ()) -> None:
        self.path, self.noun, self._classes = path, noun, classes
        self._takes_absolute = root is not None
        self._root = os.path.realpath(path.parent if root is None else root.expanduser())
        self._entries: list[_Entry] = []
        self._seen: dict[tuple[int, int], _Entry] = {}
        self._inside: dict[str, str | None] = {}
        self._problems: list[str] = []
        self._num_problems = 0
        self._labels: dict[str, str | None] = {}
        self._without_split = 0
        self._left_out: list[tuple[str, str]] = []

    def problem(self, place: int, why: str) -> None:
        """Remember what is wrong at a place."""
        self._num_problems += 1
        if len(self._problems) < MOST_PROBLEMS:
            self._problems.append(f"{self.noun} {place}: {why}")

    def leave_out(self, name: str, why: str) -> None:
        """Remember what is no part of the data, and why: a person is told."""
        self._left_out.append((name, why))

    def entry(self, place: int, name: str, label: str, *, split: str = "", attributes: Attributes = Attributes()) -> None:
        """Check one entry and keep it, or what is wrong with it."""
        try:
            file, identity = self._find(name)
            if label not in self._labels:
                self._labels[label] = self._wrong_label(label)
            if why := self._labels[label]:
                raise ValueError(why)
            if split and split.casefold() not in SPLIT_OF:
                raise ValueError(f"split is {split!r}; expected train, val or test")
            if before := self._seen.get(identity):
                if before.label != label:
                    raise ValueError(
                        f"{name!r} is the file of {self.noun} {before.place}, there with label {before.label!r}"
                    )
                if before.file == file:
                    raise ValueError(f"{name!r} is the file of {self.noun} {before.place}, too; expected each file once")
        except ValueError as error:
            self.problem(place, str(error))
            return
        entry = _Entry(place, file, name, label, SPLIT_OF.get(split.casefold(), ""), attributes)
        self._entries.append(entry)
        self._seen.setdefault(identity, entry)
        if not split and not self._without_split:
            self._without_split = place

    def _wrong_label(self, label: str) -> str | None:
        if why := class_name_problem(label):
            return f"label {label!r} cannot be the name of a class: {why}"
        if self._classes and label not in self._classes:
            return f"unknown label {label!r}; valid: {', '.join(sorted(self._classes))}"
        return None

    def _find(self, name: str) -> tuple[str, tuple[int, int]]:
        """A file's path without links, and what it is to the system; raises ValueError that says why it cannot be taken."""
        if not name or not is_text(name):
            raise ValueError(f"path is {name[:80]!r}; expected the name of a file")
        told = repr(name if len(name) <= _LONGEST_TOLD else f"{name[:_LONGEST_TOLD]}...")
        if os.path.isabs(name) and not self._takes_absolute:  # noqa: PTH117 - a million paths
            raise ValueError(f"{told} is absolute; expected a path relative to {self._root}, or the setting root=FOLDER")
        if ".." in name.split("/"):
            raise ValueError(f"{told} holds '..'; expected a path below {self._root}, without it")
        place, _, last = os.path.join(self._root, name).rpartition("/")  # noqa: PTH118
        if place not in self._inside:
            real = os.path.realpath(place)
            self._inside[place] = real if self._is_inside(real) else None
        folder = self._inside[place]
        if folder is None:
            raise ValueError(f"{told} leads outside of {self._root}; expected files below it, without links that leave it")
        file = f"{folder}/{last}"
        try:
            found = os.lstat(file)
            if stat.S_ISLNK(found.st_mode):
                file = os.path.realpath(file)
                if not self._is_inside(file):
                    raise ValueError(f"{told} is a link that leads outside of {self._root}; put the file itself there")
                found = os.lstat(file)
        except OSError as error:
            hint = "; expected '/' and not '\\' between folders" if "\\" in name else ""
            if "://" in name:
                hint = "; nothing is fetched from addresses, so bring the file here and name it as it lies here"
            raise ValueError(f"{told} is not there ({error.strerror}){hint}") from None
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{told} is no regular file")
        if not os.access(file, os.R_OK):
            raise ValueError(f"{told} cannot be read: permission denied")
        return file, (found.st_dev, found.st_ino)

    def _is_inside(self, real: str) -> bool:
        return real == self._root or real.startswith(self._root.rstrip("/") + "/")

    def write(self, out: Path, progress: Progress) -> None:
        """Write links to all files into class folders; raises DataError, with a note a problem, where there is any."""
        is_split = any(entry.split for entry in self._entries)
        if is_split and self._without_split:
            self.problem(self._without_split, "it has no split, and others have; expected train, val or test for each")
        if self._num_problems:
            error = DataError(f"{self.path} has {counted(self._num_problems, 'problem')}; nothing of it was imported")
            for told in self._problems:
                error.add_note(told)
            if self._num_problems > len(self._problems):
                error.add_note(f"and {self._num_problems - len(self._problems)} more")
            raise error
        if not self._entries:
            raise DataError(f"{self.path} names no file with a label{self._all_left_out()}")
        folders: set[str] = set()
        said = []
        for number, entry in enumerate(self._entries):
            folder = f"{entry.split}/{entry.label}" if entry.split else entry.label
            if folder not in folders:
                folders.add(folder)
                (out / folder).mkdir(parents=True, exist_ok=True)
            name = f"{folder}/{os.path.basename(entry.name)}"  # noqa: PTH119
            try:
                (out / name).symlink_to(entry.file)
            except FileExistsError:
                name = f"{folder}/{_other_name(entry.name)}"
                (out / name).symlink_to(entry.file)
            said.append((name, entry.attributes))
            if number % 1000 == 0:
                progress(number, len(self._entries))
        write_said(out, said)
        if self._left_out:
            with (out / LEFT_OUT).open("w", encoding="utf-8") as file:
                file.writelines(json.dumps({"file": name, "reason": why}) + "\n" for name, why in self._left_out)

    def _all_left_out(self) -> str:
        shown = "; ".join(f"{name}: {why}" for name, why in self._left_out[:3])
        return f" ({len(self._left_out)} left out: {shown})" if shown else ""


def _other_name(path: str) -> str:
    """A name for a file whose own one is taken in its class: with a digest of its path, and cut to what a disk can hold."""
    stem, suffix = os.path.splitext(os.path.basename(path))  # noqa: PTH119, PTH122
    digest = hashlib.sha256(path.encode()).hexdigest()[:12]
    return f"{stem.encode()[:180].decode(errors='ignore')}-{digest}{suffix.encode()[:60].decode(errors='ignore')}"
