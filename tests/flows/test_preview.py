from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shapes import SMOKE, visionloop

from components.companions import TEST_LEDGER
from components.images import decode, pixel_digest
from components.splitting import TestLedger
from flows.training.preview import GAP, LINE, TILE

FLIP = """
    - {trains: all, augmentations: [{augmentation: flip, settings: {probability: 1.0}}]}
    - {trains: head, views: 3, augmentations: [{augmentation: rotation}]}"""


def recipe(workspace: Path, phases: str) -> None:
    """The smoke recipe with these phases is the workspace's recipe `augmented`."""
    lines = [line for line in SMOKE.splitlines() if not line.startswith("  fit:")]
    lines.insert(lines.index("export:"), f"  phases: {phases}")
    (workspace / "recipes" / "augmented.yaml").write_text("\n".join(lines))


def tile(
    sheet: Image.Image, *, section: int, row: int, column: int, rows: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """A tile of a sheet of `rows` pictures in each section, at the size of the picture, 16 pixels a side."""
    left = GAP + TILE + GAP + column * (TILE + GAP)
    top = GAP + section * (LINE + rows * (TILE + GAP) + GAP) + LINE + row * (TILE + GAP)
    return np.asarray(
        sheet.crop((left, top, left + TILE, top + TILE)).convert("L").resize((16, 16), Image.Resampling.NEAREST)
    )


def test_the_sheet_shows_images_outside_the_test_as_they_are_and_as_training_changes_them(workspace: Path) -> None:
    path = workspace / TEST_LEDGER
    ledger = TestLedger.read(path)
    lying = {file: pixel_digest(decode(file.read_bytes()))[:32] for file in sorted((workspace / "data").rglob("*.png"))}
    kept = list(lying)[7::50]
    TestLedger(ledger.test_share, {digest: file not in kept for file, digest in lying.items()}).write(path)
    recipe(workspace, FLIP)
    out = workspace / "sheets" / "sheet.png"
    done = visionloop("augment", "preview", "-r", "augmented", "--out", str(out), "--json", cwd=workspace)
    assert done.returncode == 0, done.stdout
    answer = json.loads(done.stdout)
    assert sorted(answer["images"]) == [file.relative_to(workspace / "data").as_posix() for file in kept]
    assert answer["phases"] == [
        "phase 1, everything: flip",
        "phase 2, the head: rotation; 2 cached views beside the picture",
    ]
    rows = len(kept)
    with Image.open(out) as sheet:
        for row, name in enumerate(answer["images"]):
            pixels = np.asarray(Image.open(workspace / "data" / name))
            for section in (0, 1):
                assert np.array_equal(tile(sheet, section=section, row=row, column=0, rows=rows), pixels)
            assert np.array_equal(tile(sheet, section=0, row=row, column=1, rows=rows), pixels[:, ::-1])
            first, second = (tile(sheet, section=1, row=row, column=column, rows=rows) for column in (1, 2))
            assert not np.array_equal(first, second)
            assert (tile(sheet, section=1, row=row, column=3, rows=rows) == 255).all()  # there are no more views


def test_mixing_and_the_affine_augmentation_are_shown_too(workspace: Path) -> None:
    recipe(
        workspace,
        """
    - {trains: all, augmentation: {rotate_degrees: 30}, augmentations: [{augmentation: mixup}]}
    - {trains: head, augmentations: [{augmentation: mixup}]}""",
    )
    done = visionloop("augment", "preview", "-r", "augmented", "-o", "x.png", "--json", cwd=workspace)
    assert json.loads(done.stdout)["phases"] == [
        "phase 1, everything: affine, mixup",
        "phase 2, the head: mixup; mixing, shown on pictures, is of what is cached",
    ]


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("smoke", "x.png", "recipe 'smoke' augments nothing; name augmentations in a phase"),
        ("augmented", "x.jpg", "x.jpg cannot be the contact sheet; name a file that ends with .png"),
    ],
)
def test_a_preview_that_shows_nothing_is_refused(workspace: Path, name: str, file: str, message: str) -> None:
    recipe(workspace, FLIP)
    done = visionloop("augment", "preview", "-r", name, "-o", file, cwd=workspace)
    assert (done.returncode, message in done.stderr) == (2, True)
    assert not list(workspace.glob("x.*"))
