"""Copies planted among the pictures of a folder: which are found, what else is paired, and how long it takes.

Each copy is of one kind: those the floors name (JPEG at 30 to 90, another size, 5 to 15 % cut off, mirrored, another
brightness) and, told apart, what users do beside them: thumbnails, messengers, screenshots with a margin, more contrast,
several things at once. A copy is found where it is in one cluster with its original. Pairs of pictures that nobody planted
are drawn side by side on a sheet, near_duplicates.png in the current folder, as only an eye can tell the natural duplicates
among them. The peer is the perceptual hash of imagehash, at distances of up to 8 bits, where that library is installed.
Then the time of the search by embeddings, and how it grows.
"""

from __future__ import annotations

import io
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from bench.frozen_training import images_of
from bench.serving import say
from components.duplicates import clusters_of, descriptor, pairs
from components.images import decode, in_threads, pixel_digest
from components.intervals import wilson
from components.neighbours import neighbours

NUM_IMAGES, COPIES_EACH = 10_000, 100
SIZES = (60_000, 250_000, 1_000_000)
DIMENSIONS = 256
SHORT = {"NUM_IMAGES": 60, "COPIES_EACH": 3, "SIZES": (500, 1000)}
_PEER_BITS = 8
Change = Callable[[Image.Image, random.Random], Image.Image]


def run(data: Path | None, scratch: Path) -> dict[str, Any]:
    """Share of the planted copies that are found, of the kinds that the floors name; the ratio is the peer's share to it."""
    paths, _ = images_of(data, scratch, NUM_IMAGES)
    originals = [f"{number:06d}" for number in range(len(paths))]
    places = dict(zip(originals, paths, strict=True))
    kinds = _plant(places, scratch / "copies")
    start = time.perf_counter()
    table = _facts(places)
    seconds = {"one look at each file": round(time.perf_counter() - start, 1)}
    pictures = dict(zip(table["path"], table["picture"], strict=True))
    cache = scratch / "cache"
    for name in ("pairs", "pairs again"):
        start = time.perf_counter()
        found = pairs(table, read=lambda path: decode(places[path].read_bytes()), cache=cache)
        seconds[name] = round(time.perf_counter() - start, 1)
    clusters = clusters_of(found, pictures)

    def together(one: str, two: str) -> bool:
        first, second = pictures[one], pictures[two]
        return first == second or (first in clusters and clusters[first] == clusters.get(second))

    hits = Counter(kind for copy, kind in kinds.items() if together(copy, _original(copy)))
    planted = Counter(kinds.values())
    others = [pair for pair in found if _original(pair.first) != _original(pair.second)]
    unplanted = sorted({tuple(sorted((_original(p.first), _original(p.second)))) for p in others if p.relation != "pixels"})
    _sheet([(places[one], places[two]) for one, two in unplanted], Path("near_duplicates.png"))
    floor = wilson(sum(hits[kind] for kind in FLOORS), sum(planted[kind] for kind in FLOORS))
    peer = _imagehash(places, kinds)
    return {
        "ours": round(floor.value, 4),
        "peers": peer,
        "ratio": round(floor.value / peer["recall"], 2) if peer.get("recall") else None,
        "interval": [round(floor.low, 4), round(floor.high, 4)],
        "n": floor.n,
        "unit": "share of planted copies found",
        "recall": {kind: _told(hits[kind], count) for kind, count in sorted(planted.items())},
        "num_pictures": len(table),
        "unplanted_pairs": len(unplanted),
        "unplanted_pairs_per_10000": round(1e4 * len(unplanted) / len(table), 2),
        "relations": dict(Counter(pair.relation for pair in found)),
        "seconds": seconds,
        "milliseconds_per_descriptor": _descriptor_ms(paths),
        "seconds_by_embeddings": _growth(scratch),
        "data": str(data) if data else "synthetic",
    }


def _told(hits: int, count: int) -> list[float]:
    share = wilson(hits, count)
    return [round(share.value, 4), round(share.low, 4), round(share.high, 4), count]


def _original(name: str) -> str:
    return name.split(" ")[0]


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def _scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize(
        (max(16, round(image.width * factor)), max(16, round(image.height * factor))), Image.Resampling.BICUBIC
    )


def _cropped(image: Image.Image, draw: random.Random) -> Image.Image:
    """5 to 15 % less of one side, or of both, cut off at either end."""
    width, height = image.size
    sides = draw.choice(["x", "y", "xy"])
    x = draw.uniform(0.05, 0.15) if "x" in sides else 0.0
    y = draw.uniform(0.05, 0.15) if "y" in sides else 0.0
    left, top = draw.choice([0.0, x / 2, x]), draw.choice([0.0, y / 2, y])
    box = left * width, top * height, (1 - x + left) * width, (1 - y + top) * height
    return image.crop((round(box[0]), round(box[1]), round(box[2]), round(box[3])))


def _brightened(image: Image.Image, draw: random.Random) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(draw.choice([draw.uniform(0.7, 0.9), draw.uniform(1.1, 1.3)]))


def _margin(image: Image.Image, draw: random.Random) -> Image.Image:
    border = round(image.width * draw.uniform(0, 0.05)), round(image.height * draw.uniform(0.03, 0.08))
    return ImageOps.expand(image, border, draw.choice(["white", "black"]))


def _gamma(image: Image.Image, draw: random.Random) -> Image.Image:
    power = draw.choice([0.75, 1.35])
    return image.point([round(255 * (level / 255) ** power) for level in range(256)] * 3)


FLOORS: dict[str, Change] = {
    "jpeg": lambda image, draw: _jpeg(image, draw.randint(30, 90)),
    "resized": lambda image, draw: _scaled(image, draw.uniform(0.5, 1.5)),
    "cropped": _cropped,
    "flipped": lambda image, draw: ImageOps.mirror(image),
    "brightness": _brightened,
}
BESIDE: dict[str, Change] = {
    "thumbnail": lambda image, draw: _jpeg(_scaled(image, 0.25), 75),
    "messenger": lambda image, draw: _jpeg(_jpeg(_scaled(image, 0.8), 70), 60),
    "screenshot": lambda image, draw: _scaled(_margin(image, draw), 0.9),
    "contrast": lambda image, draw: ImageEnhance.Contrast(image).enhance(draw.uniform(0.7, 1.4)),
    "gamma": _gamma,
    "less colour": lambda image, draw: ImageEnhance.Color(image).enhance(draw.uniform(0, 0.6)),
    "cropped, smaller, stored badly": lambda image, draw: _jpeg(_scaled(_cropped(image, draw), 0.7), 60),
    "mirrored, stored badly": lambda image, draw: _jpeg(ImageOps.mirror(image), 50),
}


def _plant(places: dict[str, Path], folder: Path) -> dict[str, str]:
    """Copies of drawn originals, added to `places`; their kinds by name."""
    folder.mkdir()
    draw = random.Random(0)
    originals = sorted(places)
    kinds: dict[str, str] = {}
    for kind, change in (FLOORS | BESIDE).items():
        for original in draw.sample(originals, min(COPIES_EACH, len(originals))):
            name = f"{original} {kind}"
            places[name], kinds[name] = folder / f"{name}.png", kind
            change(decode(places[original].read_bytes()).stored.convert("RGB"), draw).save(places[name], compress_level=1)
    return kinds


def _facts(places: dict[str, Path]) -> pd.DataFrame:
    def look(name: str) -> tuple[str, str, bytes, int]:
        picture = decode(places[name].read_bytes())
        return name, pixel_digest(picture)[:32], descriptor(picture), min(picture.width, picture.height)

    return pd.DataFrame(in_threads(look, list(places)), columns=["path", "picture", "descriptor", "short_side"])


def _descriptor_ms(paths: Sequence[Path]) -> dict[str, float]:
    """Median milliseconds of a descriptor and of the decoding before it."""
    decoding, describing = [], []
    for path in paths[:200]:
        data = path.read_bytes()
        start = time.perf_counter()
        picture = decode(data)
        between = time.perf_counter()
        descriptor(picture)
        decoding.append(between - start)
        describing.append(time.perf_counter() - between)
    return {
        "decoding": round(1e3 * float(np.median(decoding)), 3),
        "descriptor": round(1e3 * float(np.median(describing)), 3),
    }


def _sheet(members: Sequence[tuple[Path, Path]], out: Path) -> None:
    """Pictures side by side, eight pairs a row, the first 160 pairs."""
    side, across = 96, 8
    shown = members[:160]
    sheet = Image.new("RGB", (across * (2 * side + 12), max(1, -(-len(shown) // across)) * (side + 8)), "white")
    for number, member in enumerate(shown):
        left, top = number % across * (2 * side + 12), number // across * (side + 8)
        for which, path in enumerate(member):
            image = decode(path.read_bytes()).stored.convert("RGB")
            sheet.paste(image.resize((side, side), Image.Resampling.BICUBIC), (left + which * (side + 2), top))
        ImageDraw.Draw(sheet).text((left, top + side - 10), str(number), fill="red")
    sheet.save(out)


def _imagehash(places: dict[str, Path], kinds: dict[str, str]) -> dict[str, Any]:
    """The same of imagehash's pHash; empty where it is not installed."""
    try:
        import imagehash
    except ImportError:
        say("imagehash is not installed: no peer")
        return {}
    start = time.perf_counter()
    names = list(places)
    hashes = list(in_threads(lambda name: imagehash.phash(Image.open(places[name])).hash.ravel(), names))
    bits = np.array(hashes, dtype=np.float32) * 2 - 1
    row = {name: number for number, name in enumerate(names)}
    hits = Counter(
        kind for copy, kind in kinds.items() if bits[row[copy]] @ bits[row[_original(copy)]] >= 64 - 2 * _PEER_BITS
    )
    found: set[tuple[str, str]] = set()
    for begin in range(0, len(names), 2000):
        ours, theirs = np.nonzero(bits[begin : begin + 2000] @ bits.T >= 64 - 2 * _PEER_BITS)
        for one, two in zip((ours + begin).tolist(), theirs.tolist(), strict=True):
            first, second = _original(names[one]), _original(names[two])
            if first < second:
                found.add((first, second))
    planted = Counter(kinds.values())
    return {
        "name": "imagehash phash",
        "recall": round(sum(hits[kind] for kind in FLOORS) / sum(planted[kind] for kind in FLOORS), 4),
        "unplanted_pairs": len(found),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _growth(scratch: Path) -> dict[str, list[float]]:
    """Seconds to index and search so many embeddings, then again with the index kept, and with 1 % more."""
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(1000, DIMENSIONS)).astype(np.float32)
    found: dict[str, list[float]] = {}
    for size in SIZES:
        more = size // 100
        embeddings = centres[draw.integers(0, len(centres), size + more)]
        embeddings += 0.7 * draw.standard_normal(embeddings.shape, dtype=np.float32)
        names = [f"{number:032x}" for number in range(size + more)]
        folder = scratch / f"index-{size}"
        told = []
        for count in (size, size, size + more):
            start = time.perf_counter()
            neighbours(names[:count], embeddings[:count], count=8, folder=folder)
            told.append(round(time.perf_counter() - start, 1))
        say(f"  {size} embeddings: {told} s")
        found[str(size)] = told
    return found
