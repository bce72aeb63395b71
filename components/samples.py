"""The sample table: one row an image, never just folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from components.contracts import SplitName, Splits, Stored
from components.tables import read_frame

if TYPE_CHECKING:
    import pandas as pd


def rows(splits: Stored[Splits], name: SplitName) -> pd.DataFrame:
    """The images of one split in a fixed order: path (relative to data/), label, sha256, picture, class_index."""
    table = read_frame(splits.folder / splits.record.table.name)
    chosen = table[table["split"] == name].reset_index(drop=True)
    index = {label: position for position, label in enumerate(splits.record.classes)}
    return chosen.assign(class_index=chosen["label"].map(index).astype("int64"))


def image_files(folder: Path) -> dict[str, list[Path]]:
    """Files of a one-folder-per-class tree by class, sorted; hidden files are ignored.

    Raises nothing about their content. A class is a direct sub-folder; anything deeper belongs to no class.
    """
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return {
        path.name: sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        for path in classes
    }


def stray_files(folder: Path) -> list[Path]:
    """Files of the tree that `image_files` leaves out: beside the classes, deeper than a class, or hidden."""
    listed = {path for paths in image_files(folder).values() for path in paths}
    ignored = {".DS_Store", "Thumbs.db"}  # what dataversions tells DVC to ignore
    return sorted(path for path in folder.rglob("*") if path.is_file() and path not in listed and path.name not in ignored)
