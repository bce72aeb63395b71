from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from components import plugins
from components.contracts.issues import Pair
from components.duplicates import SIZE, clusters_of, descriptor, pairs
from components.images import Picture, pixel_digest

Change = Callable[[Image.Image], Image.Image]


def scene(seed: int, size: tuple[int, int] = (240, 180)) -> Image.Image:
    """A photograph of sorts: coarse colours, a few objects, texture and noise of its own."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(40, 215, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(10):
        x, y, r = draw.integers(0, size[0]), draw.integers(0, size[1]), draw.integers(5, 40)
        pen.ellipse((int(x - r), int(y - r), int(x + r), int(y + r)), fill=tuple(draw.integers(0, 255, 3).tolist()))
    return noisy(image.filter(ImageFilter.GaussianBlur(0.7)), seed, 8)


def noisy(image: Image.Image, seed: int, deviation: float) -> Image.Image:
    noise = np.random.default_rng(seed).normal(0, deviation, (image.height, image.width, 1))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def looked_through(images: dict[str, Image.Image], *, read_too: list[str] | None = None, **settings: Any) -> list[Pair]:
    def read(path: str) -> Picture:
        if read_too is not None:
            read_too.append(path)
        return stored[path]

    stored = {path: Picture(image) for path, image in images.items()}
    table = pd.DataFrame(
        {
            "path": list(stored),
            "picture": [pixel_digest(picture)[:32] for picture in stored.values()],
            "descriptor": [descriptor(picture) for picture in stored.values()],
            "short_side": [min(picture.width, picture.height) for picture in stored.values()],
        }
    )
    return pairs(table, read=read, **settings)


CHANGES: dict[str, tuple[str, Change]] = {
    "png again": ("pixels", lambda image: image.copy()),
    "jpeg 90": ("re-encoded", lambda image: jpeg(image, 90)),
    "jpeg 30": ("re-encoded", lambda image: jpeg(image, 30)),
    "half": ("resized", lambda image: image.resize((120, 90), Image.Resampling.BICUBIC)),
    "stretched": ("resized", lambda image: image.resize((200, 180), Image.Resampling.BILINEAR)),
    "left cut": ("cropped", lambda image: image.crop((36, 0, 240, 180))),
    "bottom cut": ("cropped", lambda image: image.crop((0, 0, 240, 158))),
    "cut around, smaller, stored badly": (
        "cropped",
        lambda image: jpeg(image.crop((14, 9, 228, 166)).resize((160, 120)), 60),
    ),
    "mirrored": ("flipped", ImageOps.mirror),
    "mirrored jpeg": ("flipped", lambda image: jpeg(ImageOps.mirror(image), 60)),
    "brighter": ("near", lambda image: ImageEnhance.Brightness(image).enhance(1.25)),
    "darker": ("near", lambda image: ImageEnhance.Brightness(image).enhance(0.75)),
}


def test_copies_are_found_and_what_was_done_to_them_is_told() -> None:
    images = {f"{seed:02d}": scene(seed) for seed in range(14)}
    planted = {}
    for seed, (name, (relation, change)) in enumerate(CHANGES.items()):
        images[f"{seed:02d} {name}"] = change(images[f"{seed:02d}"])
        planted[f"{seed:02d}", f"{seed:02d} {name}"] = relation
    assert {(pair.first, pair.second): pair.relation for pair in looked_through(images)} == planted


@pytest.mark.parametrize("size", [(36, 36), (1200, 900)])
def test_small_and_large_pictures_alike(size: tuple[int, int]) -> None:
    images = {str(seed): scene(seed, size) for seed in range(6)}
    images["0 copy"] = jpeg(images["0"], 80)
    images["1 copy"] = ImageOps.mirror(images["1"])
    images["2 copy"] = images["2"].crop((round(size[0] * 0.1), 0, *size))
    assert [(pair.first, pair.second) for pair in looked_through(images)] == [(f"{i}", f"{i} copy") for i in range(3)]


def part(seed: int, size: tuple[int, int] = (256, 256)) -> Image.Image:
    """One of many parts on a line: the same part in the same place, with scratches, noise and play of its own."""
    draw = np.random.default_rng(seed)
    image = Image.new("RGB", (size[0] * 2, size[1] * 2), (90, 95, 100))
    pen = ImageDraw.Draw(image)
    x, y = draw.normal(0, 2, 2)
    pen.ellipse((80 + x, 80 + y, 432 + x, 432 + y), fill=(170, 170, 165), outline=(40, 40, 40), width=6)
    for i in range(4):
        cx, cy = 256 + x + 110 * np.cos(i * np.pi / 2), 256 + y + 110 * np.sin(i * np.pi / 2)
        pen.ellipse((cx - 22, cy - 22, cx + 22, cy + 22), fill=(30, 30, 35))
    for _ in range(draw.integers(1, 4)):
        sx, sy = draw.integers(140, 370, 2).tolist()
        pen.line((sx, sy, sx + draw.integers(-60, 60), sy + draw.integers(-60, 60)), fill=(220, 220, 220), width=3)
    light = float(draw.uniform(0.95, 1.05))
    return noisy(ImageEnhance.Brightness(image.resize(size, Image.Resampling.BOX)).enhance(light), seed, 4)


def test_parts_of_one_line_are_no_copies_of_each_other_and_their_own_copies_are_found() -> None:
    images = {f"{seed:02d}": part(seed) for seed in range(9)}
    images["03 copy"] = jpeg(images["03"], 70)
    images["07 copy"] = images["07"].crop((20, 0, 256, 256))
    assert [(pair.first, pair.second) for pair in looked_through(images)] == [("03", "03 copy"), ("07", "07 copy")]


def test_digits_written_by_hand_are_seldom_copies_of_each_other_and_their_own_copies_are_found(tmp_path: Path) -> None:
    plugins.load("sources", "digits").fetch(out=tmp_path)
    images: dict[str, Image.Image] = {
        path.name: Image.open(path).resize((42, 42), Image.Resampling.BICUBIC)
        for path in sorted((tmp_path / "1").iterdir())[:200]
    }
    originals = sorted(images)[::40]
    for name in originals:
        images[f"{name} stored"] = jpeg(images[name].convert("RGB"), 85).convert("L")
        images[f"{name} mirrored"] = ImageOps.mirror(images[name])
        images[f"{name} larger"] = images[name].resize((63, 63), Image.Resampling.BICUBIC)
    found = looked_through(images)
    alone = {tuple(sorted({pair.first.split(" ")[0], pair.second.split(" ")[0]})) for pair in found}
    assert {(name,) for name in originals} <= alone
    assert len(alone) - len(originals) <= 5
    assert {name for name in images if " " in name} <= {path for pair in found for path in (pair.first, pair.second)}


def test_of_pictures_under_32_pixels_only_those_of_equal_pixels_are_copies_and_none_is_read() -> None:
    small = scene(3, (31, 40))
    images = {"a": small, "equal": small.copy(), "stored": jpeg(small, 90), "mirrored": ImageOps.mirror(small)}
    images |= {"large": scene(4, (32, 32)), "large stored": jpeg(scene(4, (32, 32)), 90)}
    read: list[str] = []
    alike = np.ones((6, 300), dtype=np.float32)
    found = looked_through(images, read_too=read, embeddings=alike)
    assert [(pair.first, pair.second, pair.relation) for pair in found] == [
        ("a", "equal", "pixels"),
        ("large", "large stored", "re-encoded"),
    ]
    assert {*read} == {"large", "large stored"}


def test_two_photographs_of_a_burst_are_no_copies() -> None:
    """The same place a moment later: something moved, the hand shook, and the noise is another one."""
    images = {}
    for seed in range(6):
        wide = scene(seed, (280, 220))
        for moment in range(2):
            image = wide.crop((20 + 2 * moment, 20 + moment, 260 + 2 * moment, 200 + moment))
            ImageDraw.Draw(image).rectangle((100 + 6 * moment, 60, 130 + 6 * moment, 130), fill=(200, 60, 40))
            images[f"{seed} {moment}"] = noisy(image.filter(ImageFilter.GaussianBlur(1)), 100 + seed * 2 + moment, 5)
    assert looked_through(images) == []


def test_pictures_that_show_nothing_are_no_copies() -> None:
    assert looked_through({str(grey): Image.new("RGB", (64, 64), (grey,) * 3) for grey in (0, 1, 128, 255)}) == []


def test_a_cluster_is_all_that_is_joined_named_by_its_lowest_digest() -> None:
    pictures = {"a": "3", "a again": "3", "b": "1", "c": "2", "d": "5", "e": "4", "f": "6"}
    found = [
        Pair("a", "a again", "pixels", 0.0),
        Pair("a", "c", "cropped", 0.1),
        Pair("c", "b", "near", 0.1),
        Pair("d", "e", "flipped", 0.1),
        Pair("f", "f", "pixels", 0.0),
    ]
    assert clusters_of(found, pictures) == {"1": "1", "2": "1", "3": "1", "4": "4", "5": "4"}


def test_a_descriptor_has_one_size_whatever_the_picture() -> None:
    for image in (Image.new("L", (1, 1)), Image.new("RGB", (3000, 2)), scene(0)):
        assert len(descriptor(Picture(image))) == SIZE


def test_descriptors_of_another_version_are_refused() -> None:
    picture = Picture(scene(0))
    table = pd.DataFrame(
        {"path": ["a"], "picture": ["0"], "descriptor": [b"\0" + descriptor(picture)[1:]], "short_side": 180}
    )
    with pytest.raises(ValueError, match="version"):
        pairs(table, read=lambda _: picture)


def test_what_was_compared_once_is_not_read_again(tmp_path: Path) -> None:
    images = {"a": scene(1), "b": scene(2), "b copy": jpeg(scene(2), 70)}
    images |= {f"part {seed}": part(seed) for seed in range(3)}
    read: list[str] = []
    first = looked_through(images, cache=tmp_path, read_too=read)
    assert [(pair.first, pair.second) for pair in first] == [("b", "b copy")]
    assert set(read) >= {"b", "b copy", "part 0"}
    read.clear()
    assert looked_through(images, cache=tmp_path, read_too=read) == first
    assert read == []
    # One more picture, and only what it may be a copy of is read beside it.
    images["a smaller"] = images["a"].resize((120, 90))
    more = looked_through(images, cache=tmp_path, read_too=read)
    assert [(pair.first, pair.second) for pair in more] == [("a", "a smaller"), ("b", "b copy")]
    assert set(read) == {"a", "a smaller"}


def test_damaged_answers_are_found_anew(tmp_path: Path) -> None:
    images = {"a": scene(1), "b": scene(2), "b copy": jpeg(scene(2), 70)}
    first = looked_through(images, cache=tmp_path)
    (kept,) = tmp_path.rglob("pairs.json")
    kept.write_text(kept.read_text().replace("0.", "1."))
    assert looked_through(images, cache=tmp_path) == first


def test_embeddings_bring_candidates_and_never_a_pair_by_themselves() -> None:
    images = {f"{seed}": scene(seed) for seed in range(6)}
    # So much is cut off that thumbnails of the usual parts do not show it.
    images["0 much cut"] = images["0"].crop((70, 0, 240, 180))
    embeddings = np.eye(7, 300, dtype=np.float32)
    assert looked_through(images, embeddings=embeddings) == []
    embeddings[6] = embeddings[0] + 0.2 * embeddings[1]
    embeddings[3] = embeddings[2]
    found = looked_through(images, embeddings=embeddings)
    assert [(pair.first, pair.second, pair.relation) for pair in found] == [("0", "0 much cut", "cropped")]


def test_what_is_kept_of_embeddings_is_theirs_alone(tmp_path: Path) -> None:
    images = {f"{seed}": scene(seed) for seed in range(4)} | {"0 much cut": scene(0).crop((70, 0, 240, 180))}
    far = np.eye(5, 300, dtype=np.float32)
    near = far.copy()
    near[4] = far[0] + 0.2 * far[1]
    assert looked_through(images, cache=tmp_path) == []
    assert looked_through(images, cache=tmp_path, embeddings=far, embeddings_key="far") == []
    found = looked_through(images, cache=tmp_path, embeddings=near)
    assert len(found) == 1
    assert looked_through(images, cache=tmp_path, embeddings=far) == []
    assert looked_through(images, cache=tmp_path, embeddings=near, embeddings_key="near") == found
    read: list[str] = []
    assert looked_through(images, cache=tmp_path, embeddings=near, embeddings_key="near", read_too=read) == found
    assert read == []


def test_the_first_of_a_pair_is_the_one_with_more_pixels_or_the_first_by_name() -> None:
    large, other = scene(1), scene(2)
    images = {"a": large.resize((120, 90)), "b": large, "d": other, "c": jpeg(other, 70)}
    assert [(pair.first, pair.second) for pair in looked_through(images)] == [("b", "a"), ("c", "d")]
