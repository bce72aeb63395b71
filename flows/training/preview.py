"""A contact sheet: pictures of the data as they are, and beside each what the augmentations of a recipe make of it."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from components import data_folder, plugins
from components.companions import TEST_LEDGER
from components.contracts.errors import ConfigError, DataError, UndecodableImage
from components.contracts.families import Backbone
from components.images import decode, pixel_digest, prepare
from components.previews import draws
from components.splitting import TestLedger
from components.store import write_atomically
from flows.training.chosen import ChosenRecipe

if TYPE_CHECKING:
    from components.phases import Phase

TILE = 112
"""Pixels of a tile's longer side."""
GAP = 8
LINE = 24
"""Pixels of a line of text."""


@dataclass(frozen=True)
class Shown:
    """A picture of the sheet."""

    path: str
    """Relative to data/."""
    label: str
    digest: str
    pixels: npt.NDArray[np.uint8]
    """Prepared for the recipe's backbone, (h, w, c)."""


@dataclass(frozen=True)
class Preview:
    """A contact sheet that was written."""

    file: Path
    pictures: tuple[str, ...]
    """Relative to data/, from top to bottom."""
    phases: tuple[str, ...]
    """A line for each phase that augments, in the sheet's order."""


def preview(chosen: ChosenRecipe, file: Path, *, num_images: int, num_draws: int) -> Preview:
    """Write the sheet as a PNG file, a row for each picture and phase that augments; no picture is one of the frozen test.

    Raises ConfigError for a recipe that augments nothing, DataError where there are no pictures.
    """
    if file.suffix.lower() != ".png" or file.is_dir():
        raise ConfigError(f"{file} cannot be the contact sheet; name a file that ends with .png")
    training = chosen.config.training
    phases = [(number, phase) for number, phase in enumerate(training.all_phases, 1) if phase.changes or phase.mixes]
    if not phases:
        raise ConfigError(
            f"recipe {chosen.config.name!r} augments nothing; name augmentations in a phase, such as "
            f"training.phases.0.augmentations: [{{augmentation: flip}}]"
        )
    backbone: Backbone = plugins.load("backbones", training.backbone, dict(training.backbone_settings))
    shown = list(itertools.islice(_pictures(chosen.workspace.data, chosen.workspace.root, backbone), num_images))
    if not shown:
        raise DataError(
            f"{chosen.workspace.data} holds no picture outside the frozen test; run `visionloop data add FOLDER`"
        )
    images, labels, digests = (
        np.stack([one.pixels for one in shown]),
        [one.label for one in shown],
        [one.digest for one in shown],
    )
    sections = [
        (_line(number, phase), draws(phase, images, labels, digests, num_draws=num_draws)) for number, phase in phases
    ]
    content = io.BytesIO()
    _sheet(sections, shown).save(content, format="PNG")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, content.getvalue())
    return Preview(file, tuple(one.path for one in shown), tuple(line for line, _ in sections))


def _pictures(data: Path, root: Path, backbone: Backbone) -> Iterator[Shown]:
    """Pictures of data/ outside the frozen test, one of each class in turn."""
    if not data.is_dir():
        raise DataError(
            f"{data} is not there; add images with `visionloop data add FOLDER`, or get the pinned ones with `pull`"
        )
    members = TestLedger.read(root / TEST_LEDGER).members
    classes = data_folder.listing(data).classes
    for path in itertools.chain.from_iterable(itertools.zip_longest(*classes.values())):
        if path is None:
            continue
        try:
            picture = decode(path.read_bytes())
        except UndecodableImage:
            continue  # validation quarantines it
        digest = pixel_digest(picture)[:32]
        if members.get(digest) is False:
            yield Shown(
                f"{path.parent.name}/{path.name}", path.parent.name, digest, prepare(picture, backbone.preprocessing)
            )


def _line(number: int, phase: Phase) -> str:
    names = ["affine"] if phase.augmentation.active else []
    names += [chosen.augmentation for chosen in phase.augmentations]
    line = f"phase {number}, {phase.part}: {', '.join(names)}"
    if phase.trains == "all":
        return line
    line += f"; {phase.views - 1} cached views beside the picture" if phase.views > 1 else ""
    return line + ("; mixing, shown on pictures, is of what is cached" if phase.mixes else "")


def _sheet(sections: list[tuple[str, list[npt.NDArray[np.uint8]]]], shown: list[Shown]) -> Image.Image:
    font = ImageFont.load_default(14)
    columns = 1 + max(len(drawn) for _, drawn in sections)
    name_width = TILE + GAP
    longest = max(font.getlength(line) for line, _ in sections)
    width = max(name_width + columns * (TILE + GAP), round(longest)) + 2 * GAP
    height = GAP + sum(LINE + len(shown) * (TILE + GAP) + GAP for _ in sections)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for line, drawn in sections:
        draw.text((GAP, top), line, fill="black", font=font)
        top += LINE
        for row, one in enumerate(shown):
            name = one.label if font.getlength(one.label) <= TILE else f"{one.label[:11]}..."
            draw.text((GAP, top + TILE // 2 - 8), name, fill="black", font=font)
            for column, pixels in enumerate([one.pixels, *(images[row] for images in drawn)]):
                sheet.paste(_tile(pixels), (GAP + name_width + column * (TILE + GAP), top))
            top += TILE + GAP
        top += GAP
    return sheet


def _tile(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    """A picture (h, w, c) at a size that can be looked at; small ones keep their pixels as squares."""
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
    scale = TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
