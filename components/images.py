"""Files to pixels: the one decoder and the one implementation of the preprocessing contract.

Everything that looks at an image (validation, features, training, evaluation, serving) comes through here, so
train/serve skew has no second implementation to hide in. Untrusted input is bounded before it is decoded.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import (
    BmpImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from components.colours import AS_IT_IS, Conversion, conversion_of
from components.contracts.errors import UndecodableImage
from components.contracts.progress import Progress, silent
from components.formats import PINNED, Accepted, accepted_format, check_jpeg, check_pixels, check_size, png_essence

if TYPE_CHECKING:
    # Nothing else of this module needs more than Pillow and NumPy, which is why bundles can carry it as it is.
    from components.contracts.models import Preprocessing

_EXTREME = 16
"""Sides longer than this many times the other are cut to their middle before they are resized."""
_BAND = 256
"""Rows that are converted at once."""
_MAX_PREVIEWS = 32
"""Of a TIFF: the same picture in smaller sizes."""

# Once for the process, as decoding runs in threads and these are not theirs to change and restore: Pillow warns about sizes
# and odd metadata that `decode` decides on, and has a bound on pixels of its own.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
Image.MAX_IMAGE_PIXELS = None

_DECODERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    # The decoder of plain JPEG for phones' and stereo cameras' MPO too: what they put behind the picture is not looked at.
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets a picture upright, by EXIF orientation."""
_ORIENTATION, _NEW_SUBFILE_TYPE = 0x0112, 254
_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_ItemT = TypeVar("_ItemT")
_ResultT = TypeVar("_ResultT")


@dataclass(frozen=True)
class Picture:
    """A decoded picture: upright, 8 bits a channel, grey (L) or RGB."""

    stored: Image.Image
    """Its colours as the file holds them. Digests of pixels are of these, whatever becomes of colours elsewhere."""
    original: Image.Image | None = None
    """Before it became 8-bit grey or RGB, where its colours are not sRGB."""
    conversion: Conversion = AS_IT_IS

    @property
    def width(self) -> int:
        return self.stored.width

    @property
    def height(self) -> int:
        return self.stored.height

    def srgb(self) -> Image.Image:
        """Its colours in sRGB; the stored ones where the file says nothing else."""
        return self.stored if self.original is None else _to_8_bit(self.original, self.conversion)


def decode(data: bytes, accepted: Accepted = PINNED) -> Picture:
    """Encoded bytes to an upright 8-bit picture in mode L or RGB; what is not pinned yet is bounded by `accepted`.

    16-bit grey is scaled to 8 bits, transparency is put on white, CMYK and palettes become RGB.
    Raises UndecodableImage for anything that is not one whole, still picture of an accepted format and size.
    """
    with _refusing():
        opened = _open(data, accepted)
        opened.load()
        image = _upright(opened)
        stored = _to_8_bit(image)
    conversion = conversion_of(image, _colour_mode(image))
    return Picture(stored, image if conversion.transform is not None else None, conversion)


def check(data: bytes, accepted: Accepted) -> None:
    """Raise UndecodableImage for what is not accepted, without decoding a pixel: some of what passes may be damaged."""
    with _refusing():
        _open(data, accepted)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Whatever a decoder raises becomes UndecodableImage: on hostile bytes it is almost anything."""
    try:
        yield
    except UndecodableImage:
        raise
    except MemoryError:
        raise UndecodableImage("more memory than there is would be needed to decode it") from None
    except Exception as error:
        raise UndecodableImage("damaged or truncated, or of a rare kind that cannot be decoded") from error


def _open(data: bytes, accepted: Accepted) -> Image.Image:
    check_size(len(data), accepted)
    if not data:
        raise UndecodableImage("empty file")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    kind = accepted_format(data, accepted.formats)
    profile = None
    if kind == "JPEG":
        check_jpeg(data, accepted)
    elif kind == "PNG":
        data, profile = png_essence(data)
    image = _DECODERS[kind](io.BytesIO(data))
    if profile is not None:
        image.info["icc_profile"] = profile
    check_pixels(*image.size, accepted)
    if _is_several(image):
        raise UndecodableImage("animated or of several pages; accepted are still pictures")
    return image


def _is_several(image: Image.Image) -> bool:
    """Whether there are other pictures behind the first; smaller sizes of the same one do not count."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return getattr(image, "n_frames", 1) > 1
    try:
        for page in range(1, _MAX_PREVIEWS):
            image.seek(page)
            if not int(image.tag_v2.get(_NEW_SUBFILE_TYPE, 0)) & 1:
                return True
    except EOFError:
        return False
    finally:
        image.seek(0)
    return True


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        # Broken EXIF says nothing about which side is up; parsers raise almost anything on it.
        return image
    return image if turn is None else image.transpose(turn)


def _colour_mode(image: Image.Image) -> str:
    if image.mode in ("L", "LA", "1") or image.mode.startswith("I"):
        return "L"
    return "CMYK" if image.mode == "CMYK" else "RGB"


def _to_8_bit(image: Image.Image, conversion: Conversion = AS_IT_IS) -> Image.Image:
    """Mode L or RGB, transparency on white; band by band, as what lies between takes several times the picture's memory."""
    if image.mode == "F":
        raise UndecodableImage("floating-point pixels have no defined range; convert to 8 or 16 bits")
    if image.mode in ("L", "RGB") and "transparency" not in image.info and conversion.transform is None:
        return image
    out: Image.Image | None = None
    for top in range(0, image.height, _BAND):
        band = _band_to_8_bit(image.crop((0, top, image.width, min(image.height, top + _BAND))), conversion)
        out = out or Image.new(band.mode, image.size)
        out.paste(band, (0, top))
    assert out is not None
    return out


def _band_to_8_bit(image: Image.Image, conversion: Conversion) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.float32) / 257.0
        return conversion.apply(Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        if conversion.transform is not None:
            alpha = rgba.getchannel("A")
            rgba = conversion.apply(rgba.convert(_colour_mode(image))).convert("RGBA")
            rgba.putalpha(alpha)
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        flat = Image.alpha_composite(white, rgba)
        return flat.convert("L" if image.mode == "LA" else "RGB")
    if image.mode in ("L", "RGB") or (image.mode == "CMYK" and conversion.transform is not None):
        return conversion.apply(image)
    return conversion.apply(image.convert("L" if image.mode == "1" else "RGB"))


def _middle(image: Image.Image, longest: int) -> Image.Image:
    width, height = min(image.width, longest), min(image.height, longest)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def prepare(picture: Picture, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """A decoded picture to the engine's input: uint8 (height, width, channels)."""
    image = picture.srgb() if preprocessing.colour == "srgb" else picture.stored
    mode = "L" if preprocessing.channels == 1 else "RGB"
    # Pillow copies what is in that mode already.
    image = image if image.mode == mode else image.convert(mode)
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


def pixel_digest(picture: Picture) -> str:
    """sha256 of size, mode and pixels as they are stored: equal for the same picture in another encoding.

    The frozen test ledger is keyed by it, so neither the decoder's answer nor this may ever change.
    """
    image = picture.stored
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
