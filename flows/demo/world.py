"""The demo's pictures: what the model is trained on, and what production looks like after its world moved."""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from components import plugins
from flows.workspace.workspace import Workspace


@dataclass(frozen=True)
class Picture:
    """One digit of the world: what it is, and its encoded bytes."""

    name: str
    label: str
    data: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def halves(workspace: Workspace) -> tuple[list[Picture], list[Picture]]:
    """The world's pictures, every other one; the classes take turns."""
    folder = workspace.cache / "world"
    if not folder.exists():
        plugins.load("sources", "digits").fetch_world(out=folder)
    found = []
    for path in sorted(folder.rglob("*.bmp"), key=lambda p: p.name):
        data = io.BytesIO()
        Image.open(path).save(data, "PNG")
        found.append(Picture(path.stem, path.parent.name, data.getvalue()))
    traffic, asked = found[::2], found[1::2]
    assert not {p.name for p in traffic} & {p.name for p in asked}
    return traffic, asked


def moved(picture: Picture) -> Picture:
    """The picture as another camera would show it: noisier, blurred or darker, decided by its name."""
    kind = int(hashlib.sha256(picture.name.encode()).hexdigest()[:8], 16)
    image = Image.open(io.BytesIO(picture.data)).convert("L")
    pixels: npt.NDArray[np.floating[Any]] = np.asarray(image, dtype=np.float32)
    rng = np.random.default_rng(kind)
    if kind % 3 == 0:
        pixels = pixels + rng.normal(0, 42, pixels.shape)
    elif kind % 3 == 1:
        pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1.3)), dtype=np.float32)
    else:
        pixels = pixels * 0.3
    data = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(data, "PNG")
    return Picture(picture.name, picture.label, data.getvalue())


def black(number: int) -> Picture:
    """A frame of a camera that sees nothing: sensor noise of a grey level or two."""
    noise = np.random.default_rng(number).integers(0, 3, (28, 28)).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).save(data, "PNG")
    return Picture(f"black-{number}", "", data.getvalue())


def fill(asked: str, filled: Path, known: dict[str, str], labeller: str) -> set[str]:
    """Fill in the labels of the images of a list that the labeller knows; returns the images."""
    rows = list(csv.DictReader(io.StringIO(asked)))
    labelled = set()
    for row in rows:
        row["label"] = known.get(row["image_sha256"], "")
        row["labelled_by"] = labeller if row["label"] else ""
        labelled |= {row["image_sha256"]} if row["label"] else set()
    with filled.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return labelled
