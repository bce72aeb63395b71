"""Files to pixels: the one decoder and the one implementation of the preprocessing contract.

Everything that looks at an image (validation, features, training, evaluation, serving) comes through here, so
train/serve skew has no second implementation to hide in. Untrusted input is bounded before it is decoded.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from components.contracts import Preprocessing, Progress, UndecodableImage, silent

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
"""Accepted encodings, found by content and never by file name."""
MAX_PIXELS = 50_000_000
MAX_BYTES = 64 << 20
_MAX_SCANS = 100
"""Of a progressive JPEG; each is a pass over the whole picture, and a small file can hold thousands."""
_EXTREME = 16
"""Sides longer than this many times the other are cut to their middle before they are resized."""

# Pillow warns about sizes and odd metadata that `decode` decides on. Once for the process: decoding runs in threads, and
# warning filters are not theirs to change and restore.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_ItemT = TypeVar("_ItemT")
_ResultT = TypeVar("_ResultT")


def decode(data: bytes, *, formats: tuple[str, ...] = FORMATS, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Encoded bytes to an upright 8-bit image in mode L or RGB.

    16-bit grey is scaled to 8 bits, transparency is put on white, CMYK and palettes become RGB.
    Raises UndecodableImage for anything that is not one whole, still picture of an accepted format and size.
    """
    if len(data) > MAX_BYTES:
        raise UndecodableImage(f"{len(data)} bytes, accepted are up to {MAX_BYTES}")
    if not data:
        raise UndecodableImage("empty file")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=formats)
        width, height = image.size
        if image.format == "JPEG" and data.count(b"\xff\xda") > _MAX_SCANS:
            raise UndecodableImage(f"a JPEG of more than {_MAX_SCANS} scans")
        if width * height > max_pixels:
            raise UndecodableImage(f"{width}x{height} pixels, accepted are up to {max_pixels}")
        # An MPO is a phone's or stereo camera's JPEG with previews behind the picture; the picture is the first.
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
            raise UndecodableImage("animated or multi-page; accepted are still pictures")
        image.load()
        image = ImageOps.exif_transpose(image)
        return _to_8_bit(image)
    except UndecodableImage:
        raise
    except UnidentifiedImageError:
        raise UndecodableImage(f"not an image in an accepted format ({', '.join(formats)})") from None
    except Image.DecompressionBombError:
        raise UndecodableImage(f"more pixels than accepted ({max_pixels})") from None
    except Exception as error:
        # Decoders raise almost anything on hostile bytes (struct.error, SyntaxError, OverflowError, ...).
        raise UndecodableImage(f"damaged or truncated ({type(error).__name__})") from None


def _to_8_bit(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.float32) / 257.0
        return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    if image.mode == "F":
        raise UndecodableImage("floating-point pixels have no defined range; convert to 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        flat = Image.alpha_composite(white, rgba)
        return flat.convert("L" if image.mode == "LA" else "RGB")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _middle(image: Image.Image, longest: int) -> Image.Image:
    width, height = min(image.width, longest), min(image.height, longest)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def prepare(image: Image.Image, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """A decoded image to the engine's input: uint8 (height, width, channels)."""
    image = image.convert("L" if preprocessing.channels == 1 else "RGB")
    width, height = image.size
    if max(width, height) > _EXTREME * min(width, height):
        # Resized as a whole, a picture of 65,000 x 1 pixels would be 14 million pixels wide. Only its middle is used.
        image = _middle(image, _EXTREME * min(width, height))
        width, height = image.size
    scale = preprocessing.resize_shortest / min(width, height)
    resized = (max(1, round(width * scale)), max(1, round(height * scale)))
    if resized != image.size:
        # Pillow's resize filters over the source support, which is what "antialiased" means.
        image = image.resize(resized, _RESAMPLING[preprocessing.interpolation])
    left, top = (resized[0] - preprocessing.width) // 2, (resized[1] - preprocessing.height) // 2
    image = image.crop((left, top, left + preprocessing.width, top + preprocessing.height))
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels.reshape(preprocessing.height, preprocessing.width, preprocessing.channels)


STATISTICS = ("brightness", "contrast", "sharpness", "saturation")
"""Names of what `appearance` returns, in its order."""


def appearance(pixels: npt.NDArray[np.uint8]) -> tuple[float, float, float, float]:
    """Brightness, contrast, sharpness and saturation of a prepared image (h, w, c), each in [0, 1].

    Mean and standard deviation of luma, the mean absolute second difference along the rows, and the mean spread of the
    colour channels, from about 56 rows of the picture: what tells a dark, blurred or discoloured one costs 0.1 ms.
    """
    rows = pixels[:: max(1, pixels.shape[0] // 56)]
    if pixels.shape[2] == 3:
        luma = rows @ _LUMA
        red, green, blue = (rows[:, ::4, channel] for channel in range(3))
        spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
        saturation = float(spread.mean()) / 255.0
    else:
        luma, saturation = rows[:, :, 0].astype(np.float32), 0.0
    second = np.abs(2 * luma[:, 1:-1] - luma[:, :-2] - luma[:, 2:])
    return float(luma.mean()) / 255.0, float(luma.std()) / 127.5, float(second.mean()) / 510.0, saturation


def pixel_digest(image: Image.Image) -> str:
    """sha256 of size, mode and pixels: equal for the same picture in another encoding."""
    header = f"{image.mode} {image.width} {image.height}\n".encode()
    return hashlib.sha256(header + image.tobytes()).hexdigest()


def in_threads(
    function: Callable[[_ItemT], _ResultT], items: Sequence[_ItemT], *, workers: int = 2, progress: Progress = silent
) -> Iterator[_ResultT]:
    """`map` over a few threads, results in order and at most a few pending; decoding releases the GIL."""
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[_ResultT]] = deque()
        submitted = 0
        for done in range(len(items)):
            while submitted < len(items) and len(pending) < workers * 16:
                pending.append(pool.submit(function, items[submitted]))
                submitted += 1
            yield pending.popleft().result()
            progress(done + 1, len(items))


def load_prepared(path: Path, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """A file to the engine's input; raises UndecodableImage naming the file."""
    try:
        return prepare(decode(path.read_bytes()), preprocessing)
    except UndecodableImage as error:
        raise UndecodableImage(f"{path}: {error}") from None


def batches(
    paths: Sequence[Path], preprocessing: Preprocessing, *, batch_size: int, progress: Progress = silent
) -> Iterator[npt.NDArray[np.uint8]]:
    """Files to batches of uint8 (n, h, w, c) in order; holds one batch in memory."""
    yield from stacked(in_threads(lambda path: load_prepared(path, preprocessing), paths, progress=progress), batch_size)


def stacked(images: Iterator[npt.NDArray[np.uint8]], batch_size: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Images (h, w, c) to batches (n, h, w, c) in order; the last one may be smaller."""
    while batch := list(itertools.islice(images, batch_size)):
        yield np.stack(batch)
