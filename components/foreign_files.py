"""Files that come from elsewhere, out of an archive or a bucket: names that every disk can hold, and how much may come.

What is received lies in a hidden folder until all of it is there; only then do its class folders become the images of a
source, or its manifest says which of its files do.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from components import plugins
from components.attributes import LEFT_OUT
from components.contracts.errors import DataError
from components.contracts.wording import counted, is_text
from components.data_folder import shown
from components.samples import OF_FILE_MANAGERS, alike
from components.transfers import linked

MANIFESTS = ("manifest.csv", "manifest.jsonl")
"""Names of the file at the top that says which files are the images."""
MOST_PROBLEMS = 20
"""So many are listed; a person who sees them knows what is wrong."""
RECEIVED = ".received"
"""The folder in a source's `out` for what it got from elsewhere and what it needs to go on, which is no class."""
_MAX_PART, _MAX_NAME, _MAX_DEPTH = 255, 1024, 32
"""Bytes of a part of a name and of all of it, and how many parts it has at most."""
GB = 1 << 30
_DRIVE = re.compile(r"[A-Za-z]:[/\\]")


class Quotas(BaseModel):
    """How much may come at once; what is more ends it, since nobody knows where a stream of somebody else ends."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_files: int = Field(default=2_000_000, ge=1)
    """Files and folders."""
    max_file_mb: int = Field(default=256, ge=1)
    """Size of a single file; a picture of more cannot be decoded anyway."""
    max_gb: int = Field(default=200, ge=1)
    """Size of all of them."""

    def check_count(self, count: int, told: str) -> None:
        """Raise DataError for more files than may come."""
        if count > self.max_files:
            raise DataError(
                f"{told} holds more than {self.max_files} files and folders; nothing of it was imported. Raise max_files "
                f"if that is right, or bring it in parts"
            )

    def check_file(self, num_bytes: int, file: str, told: str) -> None:
        """Raise DataError for a file that is larger than one may be."""
        if num_bytes > self.max_file_mb << 20:
            raise DataError(
                f"{told}: {file} has more than {self.max_file_mb} MB; nothing of it was imported. Raise max_file_mb if that "
                f"is right, or leave the file out there"
            )

    def check_total(self, num_bytes: int, told: str) -> None:
        """Raise DataError for more bytes than may come."""
        if num_bytes > self.max_gb * GB:
            raise DataError(
                f"{told} holds more than {self.max_gb} GB; nothing of it was imported. Raise max_gb if that is right and "
                f"the disk has the space, or bring it in parts"
            )


class Names:
    """Names of files below one folder, such that every disk can hold them and tell each from the others."""

    def __init__(self) -> None:
        self._files: dict[str, str] = {}
        self._folders: dict[str, str] = {}

    def __len__(self) -> int:
        """How many files there are, with all folders around them."""
        return len(self._files) + len(self._folders)

    def problem(self, name: str, *, is_folder: bool = False) -> str:
        """Why a name cannot be taken beside those before it; empty when it can, and then it is taken."""
        wrong = _wrong(name)
        if wrong:
            return wrong
        above = name if is_folder else name.rpartition("/")[0]
        wrong = self._take_folder(above) if above else ""
        if wrong or is_folder:
            return wrong
        key = alike(name)
        if key in self._folders:
            return "there is a folder of that name, too"
        if key in self._files:
            return "it is there twice" if self._files[key] == name else _twins(self._files[key])
        self._files[key] = name
        return ""

    def _take_folder(self, name: str) -> str:
        key = alike(name)
        if key in self._folders:
            return "" if self._folders[key] == name else _twins(self._folders[key])
        if key in self._files:
            return "a file has the name of its folder, or differs from it only in upper and lower case"
        above = name.rpartition("/")[0]
        wrong = self._take_folder(above) if above else ""
        if not wrong:
            self._folders[key] = name
        return wrong


def _twins(other: str) -> str:
    return f"its name differs from {shown(Path(other))} only in upper and lower case or in how its letters are composed"


def _wrong(name: str) -> str:
    """Why no file can be called so."""
    parts = name.split("/")
    if name.startswith("/") or _DRIVE.match(name):
        return "its path is absolute"
    if ".." in parts:
        return "its path leads out of its folder ('..')"
    if not name or "" in parts or "." in parts:
        return "a part of its path is empty or '.'"
    if not is_text(name):
        return "its name holds a line break, another control character, or bytes that are no UTF-8"
    if "\\" in name:
        return "its name holds a backslash; folders are told apart by '/'"
    if len(name.encode()) > _MAX_NAME or any(len(part.encode()) > _MAX_PART for part in parts):
        return f"its path has more than {_MAX_NAME} bytes, or a part of it more than {_MAX_PART}"
    if len(parts) > _MAX_DEPTH:
        return f"it lies more than {_MAX_DEPTH} folders deep"
    if parts[0] == RECEIVED:
        return f"{RECEIVED} is a name of visionloop's own"
    return ""


def refused(told: str, problems: Sequence[str], advice: str) -> DataError:
    """The error that lists what is wrong with the files of an archive or a bucket, a line each."""
    more = " or more" if len(problems) >= MOST_PROBLEMS else ""
    first = f"{told} has {counted(len(problems), 'file')}{more} that cannot be taken; nothing of it was imported. {advice}"
    error = DataError(f"{first}. First: {problems[0]}")
    for problem in problems[1:MOST_PROBLEMS]:
        error.add_note(problem)
    return error


def receiving(out: Path) -> Path:
    """The folder below a source's `out` for files that come, beside which it may keep what it needs to go on.

    All else in `out` is removed: an earlier call that was killed has left it.
    """
    for path in out.iterdir() if out.is_dir() else ():
        if path.name != RECEIVED:
            _remove(path)
    folder = out / RECEIVED / "files"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def settle(out: Path, told: str, *, keep: bool) -> None:
    """Make what was received the images of a source: as its manifest says, or as it lies there.

    What is no part of them is told in `left_out.jsonl`. With `keep` the files stay received, too, so that a call after one
    that was killed need not get them again. Raises DataError for two manifests, and where there is no folder.
    """
    folder = out / RECEIVED / "files"
    manifests = [name for name in MANIFESTS if (folder / name).is_file()]
    if len(manifests) > 1:
        raise DataError(f"{told} has {' and '.join(manifests)} at its top; expected one of them. Nothing was imported")
    if manifests:
        _as_listed(folder, manifests[0], out, told)
    else:
        _as_it_lies(folder, out, told, keep=keep)
    if not keep:
        shutil.rmtree(out / RECEIVED)


def bring(file: Path, target: Path) -> None:
    """Give what was received its place among the images, by a second name where the disk has such."""
    if not linked(file, target):
        os.replace(file, target)


def _bring_all(path: Path, target: Path) -> None:
    if path.is_dir():
        target.mkdir()
        for inner in path.iterdir():
            _bring_all(inner, target / inner.name)
    else:
        bring(path, target)


def _as_listed(folder: Path, manifest: str, out: Path, told: str) -> None:
    try:
        plugins.load("sources", "manifest", {"path": folder / manifest}).fetch(out=out)
    except DataError as error:
        # A person knows the archive, and not the folder that it was unpacked into.
        first, *notes = (
            text.replace(f"{folder}/", f"{told}: ").replace(str(folder), told)
            for text in (str(error), *getattr(error, "__notes__", ()))
        )
        of_archive = DataError(first)
        for note in notes:
            of_archive.add_note(note)
        raise of_archive from error
    root = folder.resolve()
    named = {root / manifest}
    links = [path for path in out.rglob("*") if path.is_symlink()]
    for link in links:
        file = link.resolve()
        named.add(file)
        link.unlink()
        bring(file, link)  # as what it leads to is removed in the end
    received = (Path(place, file) for place, _, files in os.walk(root) for file in files)
    unnamed = sorted(path.relative_to(root).as_posix() for path in received if path not in named)
    leave_out(out, ((name, f"{manifest} does not name it") for name in unnamed))


def _as_it_lies(folder: Path, out: Path, told: str, *, keep: bool) -> None:
    seen = visible(folder)
    loose = [path for path in seen if not path.is_dir()]
    if len(loose) == len(seen):
        raise DataError(
            f"{told} has no folders; expected one per class, or a {' or '.join(MANIFESTS)} at its top that names the class "
            f"of each file. Nothing was imported"
        )
    leave_out(out, ((path.name, "it lies beside the class folders") for path in loose))
    for path in sorted(folder.iterdir()):
        if path not in loose:
            if keep:
                _bring_all(path, out / path.name)
            else:
                os.replace(path, out / path.name)


def leave_out(out: Path, files: Iterable[tuple[str, str]]) -> None:
    """Tell which files a source did not take, and why."""
    lines = [json.dumps({"file": name, "reason": why}, ensure_ascii=False) + "\n" for name, why in files]
    if lines:
        with (out / LEFT_OUT).open("a", encoding="utf-8") as told:
            told.writelines(lines)


def visible(folder: Path) -> list[Path]:
    """What lies in a folder, in order, without what is hidden or left there by file managers."""
    return [
        path
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and path.name.casefold() not in OF_FILE_MANAGERS
    ]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
