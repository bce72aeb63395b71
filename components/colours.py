"""Colour profiles: pixels as a file holds them to sRGB, the colours that networks are trained on.

A file says what its numbers mean by an ICC profile, by the chunks gAMA and cHRM of a PNG, or (cameras, DCF 2.0) by the EXIF
mark "R03" for Adobe RGB; of several the first counts. A file that says nothing is sRGB, and so is one that says sRGB: its
pixels stay as they are. What is said wrongly (a broken profile, one of another colour space than the pixels, one that
only a printer driver understands, more than MAX_PROFILE bytes) is ignored, and the reason is told.
Converting is LittleCMS's, perceptual intent, on 8-bit pixels, before anything is resized; transparency keeps its values.
Not understood: profiles inside BMP files, cICP of high dynamic range, calibration of a TIFF without a profile.
"""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

from components.formats import MAX_PROFILE

_CLASSES = (b"scnr", b"mntr", b"prtr", b"spac")
"""Device classes that say what pixels mean: input, display, output and colour space."""
_SPACES = {"L": b"GRAY", "RGB": b"RGB ", "CMYK": b"CMYK"}
_WORDS = {b"GRAY": "grey", b"RGB ": "RGB", b"CMYK": "CMYK", b"Lab ": "Lab", b"XYZ ": "XYZ"}
_ROUNDING = 1
"""Grey levels by which sRGB profiles of several makers differ; a profile that changes no colour by more is sRGB."""
_SRGB_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
"""x and y of white, red, green and blue."""
_ADOBE_RGB_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
_ADOBE_RGB_GAMMA = 563 / 256
_EXIF, _INTEROPERABILITY = 0x8769, 0xA005
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_D50 = np.array([0.9642, 1.0, 0.8249])


@dataclass(frozen=True)
class Conversion:
    """How pixels of one mode become sRGB."""

    transform: ImageCms.ImageCmsTransform | None = None
    """None where they stay as they are."""
    problem: str = ""
    """Why what the file says about its colours is ignored."""

    def apply(self, image: Image.Image) -> Image.Image:
        """sRGB of an image (L, RGB or CMYK): grey stays grey, everything else becomes RGB."""
        if self.transform is None:
            return image
        # A transform keeps no cache of its last pixel (NOCACHE), so that threads may share it.
        converted = self.transform.apply(image if image.mode == self.transform.input_mode else image.convert("RGB"))
        return converted.convert("L") if image.mode == "L" else converted


AS_IT_IS = Conversion()


def conversion_of(image: Image.Image, mode: str) -> Conversion:
    """The conversion that a file asks for, its pixels being of `mode` (L, RGB or CMYK); raises nothing."""
    profile = image.info.get("icc_profile")
    if profile is not None:
        return _of_profile(bytes(profile), mode)
    if "icc_profile" in image.info:
        return Conversion(problem="the parts of its colour profile do not fit together")
    if mode == "CMYK" or "srgb" in image.info:
        return AS_IT_IS
    if "gamma" in image.info:
        return _of_png(float(image.info["gamma"]), tuple(image.info.get("chromaticity", _SRGB_PRIMARIES)))
    if mode == "RGB" and b"R03" in image.info.get("exif", b"") and _is_adobe_rgb(image):
        return _of_primaries(_ADOBE_RGB_PRIMARIES, _ADOBE_RGB_GAMMA)
    return AS_IT_IS


def _is_adobe_rgb(image: Image.Image) -> bool:
    try:
        exif = image.getexif()
        exif.get_ifd(_EXIF)  # which names the next one
        return str(exif.get_ifd(_INTEROPERABILITY).get(1, "")).startswith("R03")
    except Exception:
        return False  # broken EXIF says nothing


def _of_png(gamma: float, primaries: tuple[float, ...]) -> Conversion:
    # The tolerances of libpng, within which it takes a file for sRGB.
    if abs(gamma * 2.2 - 1) < 0.05 and np.allclose(primaries, _SRGB_PRIMARIES, atol=0.01):
        return AS_IT_IS
    if not 0.1 <= gamma <= 10:
        return Conversion(problem=f"its gamma is {gamma:g}")
    return _of_primaries(primaries, 1 / gamma)


@functools.lru_cache(maxsize=16)
def _of_primaries(primaries: tuple[float, ...], gamma: float) -> Conversion:
    try:
        profile = matrix_profile(primaries, gamma)
    except (ValueError, struct.error, np.linalg.LinAlgError):
        return Conversion(problem="its primaries are no colours")
    return _of_profile(profile, "RGB")


@functools.lru_cache(maxsize=16)
def _of_profile(profile: bytes, mode: str) -> Conversion:
    """A printing profile takes tenths of a second to prepare, and the pictures of a folder mostly have the same."""
    space = profile[16:20]
    if not profile or len(profile) > MAX_PROFILE:
        return Conversion(problem=f"its colour profile is broken or larger than {MAX_PROFILE} bytes")
    if len(profile) < 132 or profile[36:40] != b"acsp":
        return Conversion(problem="its colour profile is broken")
    if profile[12:16] not in _CLASSES:
        return Conversion(problem="its colour profile is not one of a picture")
    if space != _SPACES[mode]:
        found = _WORDS.get(space, "others")
        return Conversion(problem=f"its colour profile is for {found} pixels and it holds {_WORDS[_SPACES[mode]]} ones")
    try:
        transform = ImageCms.ImageCmsTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
            mode,
            "RGB",
            ImageCms.Intent.PERCEPTUAL,
            flags=ImageCms.Flags.NOCACHE,
        )
        conversion = Conversion(transform)
        if mode != "CMYK" and _changes(conversion, mode) <= _ROUNDING:
            return AS_IT_IS
    except Exception:
        # LittleCMS tells what it does not understand as OSError or PyCMSError.
        return Conversion(problem="its colour profile is broken")
    return conversion


def _changes(conversion: Conversion, mode: str) -> int:
    """The most grey levels by which a conversion changes one of many colours."""
    levels = np.arange(256, dtype=np.uint8)
    if mode == "L":
        colours = levels[None]
    else:
        steps = np.linspace(0, 255, 18).round().astype(np.uint8)
        grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
        colours = np.concatenate([grid, np.repeat(levels[:, None], 3, axis=1)])[None]
    found = np.asarray(conversion.apply(Image.fromarray(colours)))
    return int(np.abs(found.astype(int) - colours.astype(int)).max())


def matrix_profile(primaries: Sequence[float], gamma: float) -> bytes:
    """An ICC profile (version 2) of a display: x and y of white, red, green and blue, and one exponent for all of them.

    Raises ValueError or LinAlgError for primaries that span no colours.
    """
    white, *colours = (_xyz(x, y) for x, y in zip(primaries[::2], primaries[1::2], strict=True))
    matrix = np.stack(colours, axis=1)
    matrix = matrix * np.linalg.solve(matrix, white)
    adapted = np.linalg.inv(_BRADFORD) @ np.diag((_BRADFORD @ _D50) / (_BRADFORD @ white)) @ _BRADFORD @ matrix
    if not np.isfinite(adapted).all() or np.abs(adapted).max() > 10:
        raise ValueError("primaries that span no colours")
    name = b"visionloop"
    curve = struct.pack(">4sIIHH", b"curv", 0, 1, round(gamma * 256), 0)
    tags = {
        b"desc": struct.pack(">4sII", b"desc", 0, len(name) + 1) + name + b"\0" * 80,
        b"wtpt": _xyz_tag(_D50),
        **{tag: _xyz_tag(adapted[:, index]) for index, tag in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))},
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += struct.pack(">4sII", tag, start + len(body), len(content))
        body += content
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"\0\0\0\0", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    header += b"\0" * 12 + b"acsp" + b"\0" * 28
    header += struct.pack(">3i", *(round(float(value) * 65536) for value in _D50))
    return header.ljust(128, b"\0") + table + body


def _xyz(x: float, y: float) -> npt.NDArray[np.float64]:
    if not (0 <= x <= 1 and 0 < y <= 1):
        raise ValueError(f"({x}, {y}) is no colour")
    return np.array([x / y, 1.0, (1 - x - y) / y])


def _xyz_tag(values: npt.NDArray[np.float64]) -> bytes:
    return struct.pack(">4sI3i", b"XYZ ", 0, *(round(float(value) * 65536) for value in values))
