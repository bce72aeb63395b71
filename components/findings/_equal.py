"""Files that hold the same picture, pixel for pixel, whatever they are called and however they are encoded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def equal_pictures(table: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The rows of each picture that several files of a table of facts hold."""
    several = table[table.duplicated("picture", keep=False)]
    for _, rows in several.groupby("picture", sort=True):
        yield rows
