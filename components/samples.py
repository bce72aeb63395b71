"""The sample table: one row an image, never just folders."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING

from components.contracts.data import SplitName, Splits
from components.contracts.records import Stored
from components.contracts.wording import is_text
from components.tables import read_frame

if TYPE_CHECKING:
    import pandas as pd


def rows(splits: Stored[Splits], name: SplitName) -> pd.DataFrame:
    """The images of one split in a fixed order: path (relative to data/), label, sha256, picture."""
    table = read_frame(splits.folder / splits.record.table.name)
    return table[table["split"] == name].reset_index(drop=True)


MAX_CLASS_NAME_BYTES = 255
OF_FILE_MANAGERS = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx"}
"""Names, in lower case, of files and folders that file managers leave beside people's own; they are no data."""
_SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
SPLIT_OF = {name: split for split, names in _SPLIT_FOLDERS.items() for name in names}
"""The split that a folder of class folders is, by its name in lower case."""


def class_name_problem(name: str) -> str | None:
    """Why this cannot be the name of a class, or None: the one rule for folders of images and for labels.

    A class is a folder in the data, a line in files and tables, and is compared letter by letter.
    """
    if not name or name != name.strip():
        return "it is empty, or begins or ends with white space"
    if name.startswith("."):
        return "it begins with a dot, which hides a folder"
    if name.casefold() in OF_FILE_MANAGERS:
        return "file managers leave things of that name, so it is left out of data"
    if "/" in name or not is_text(name):
        return "it holds '/', a line break, another control character, or bytes that are no UTF-8"
    if len(name.encode()) > MAX_CLASS_NAME_BYTES:
        return f"it has more than {MAX_CLASS_NAME_BYTES} bytes"
    return None


def alike(name: str) -> str:
    """The same for names that differ only in upper and lower case or in how Unicode composes their letters."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def class_twins(labels: Iterable[str]) -> list[str]:
    """A sentence for each group of class names that look alike but are several classes."""
    groups: dict[str, list[str]] = {}
    for label in sorted(labels):
        groups.setdefault(alike(label), []).append(label)
    found = []
    for names in groups.values():
        if len(names) > 1:
            shown = ", ".join(repr(name) if name.isascii() else f"{name!r} ({name!a})" for name in names)
            found.append(
                f"the classes {shown} differ only in upper and lower case or in how their letters are composed; "
                f"if they are one class, move their images into one folder"
            )
    return found
