"""What an encoded picture is, read before a decoder sees it: its format, and what around the picture could hurt or mislead.

Cameras, phones, scanners and editors put a lot before and behind a picture: profiles, previews, edit histories, maker notes,
whole films. None of it counts against the picture. What is bounded is what costs time or memory to decode.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from components.contracts.errors import UndecodableImage

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
"""Encodings that can be decoded, found by content and never by file name."""


@dataclass(frozen=True)
class Accepted:
    """Which pictures are taken: one list and one bound for new data and for serving, which a setting may change."""

    formats: tuple[str, ...] = FORMATS
    max_pixels: int = 1 << 26
    """67 megapixels: what cameras and phones write, but for modes of 100 megapixels and more."""
    max_bytes: int = 32 << 20


PINNED = Accepted(max_pixels=1 << 28, max_bytes=256 << 20)
"""What can be decoded at all, and with it what can be accepted: pinned data stay usable when a setting is made stricter."""
MAX_PROFILE = 8 << 20
"""Bytes of a colour profile; the largest printing profiles have about that."""
_MAX_SCANS = 100
"""Of a JPEG. Encoders write up to about 20; each is a pass over the whole picture, and a small file can hold thousands."""
_MANY_SCANS = 20
_MAX_SCANNED_PIXELS = 2_500_000_000
"""Scans times pixels of a JPEG of more than `_MANY_SCANS`: some seconds of decoding."""
_MAX_SEGMENTS = 4096
"""Of a JPEG. 64 MB of metadata are 1,000 segments; every one of a million small ones takes time."""
_MAX_EXIF_SEGMENTS = 256
_MAX_JUNK = 64 << 10
"""Bytes of a JPEG before its picture that belong to no segment."""
_MAX_CHUNKS = 1 << 17
"""Of a PNG. Encoders write pixels in chunks of some kilobytes."""

_NAMES = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WebP", "BMP": "BMP", "PPM": "PPM", "TIFF": "TIFF"}
_SIGNATURES: tuple[tuple[str, bytes], ...] = (
    ("JPEG", rb"\xff\xd8\xff"),
    ("PNG", rb"\x89PNG\r\n\x1a\n"),
    ("WEBP", rb"RIFF....WEBP"),
    ("BMP", rb"BM"),
    ("PPM", rb"P[0-6fy]\s|Py"),
    ("TIFF", rb"II\*\0|MM\0\*|MM\*\0|II\0\*|II\+\0|MM\0\+"),
    ("a GIF", rb"GIF8[79]a"),
    ("an AVIF picture", rb"....ftyp(?:avi[fso]|MA1[AB])"),
    ("a HEIC or HEIF picture", rb"....ftyp(?:hei|hev|mif|msf|miaf|Mi[A-Z])"),
    ("a Canon raw file", rb"....ftypcrx "),
    ("a film", rb"....ftyp|....moov|\x1a\x45\xdf\xa3|RIFF....AVI "),
    ("a JPEG XL picture", rb"\xff\x0a|\0\0\0\x0cJXL "),
    ("a JPEG 2000 picture", rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    ("a JPEG XR picture", rb"II\xbc"),
    ("a Photoshop file", rb"8BPS"),
    ("an icon", rb"\0\0[\x01\x02]\0[^\0]"),
    ("an OpenEXR picture", rb"v/1\x01"),
    ("a Radiance HDR picture", rb"#\?(?:RADIANCE|RGBE)"),
    ("a QOI picture", rb"qoif"),
    ("a DICOM file", rb".{128}DICM"),
    ("a FITS file", rb"SIMPLE  ="),
    ("a raw camera file", rb"FUJIFILMCCD-RAW|IIU\0|IIRO|IIRS|MMOR"),
    ("a PDF", rb"%PDF"),
    ("a PostScript file", rb"%!PS|\xc5\xd0\xd3\xc6"),
    ("an SVG drawing", rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml.{0,1000}?)?(?:<!--.{0,1000}?-->\s*)?(?:<!DOCTYPE svg|<svg)"),
    ("a web page", rb"(?i:(?:\xef\xbb\xbf)?\s*(?:<!doctype html|<html|<head|<body))"),
    ("a ZIP archive", rb"PK\x03\x04|PK\x05\x06"),
    ("a compressed file", rb"\x1f\x8b|7z\xbc\xaf|BZh|\xfd7zXZ|Rar!"),
    ("a pointer of Git LFS", rb"version https://git-lfs"),
)
_PATTERNS = tuple((name, re.compile(pattern, re.DOTALL)) for name, pattern in _SIGNATURES)


def shown(formats: Iterable[str]) -> str:
    """Formats as people write them."""
    return ", ".join(_NAMES[name] for name in formats)


def format_of(data: bytes) -> str:
    """The format that a file has by its first bytes: one of FORMATS, or in words what else it is; empty when unknown."""
    head = data[:4096]
    return next((name for name, pattern in _PATTERNS if pattern.match(head)), "")


_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "PPM": ".ppm", "TIFF": ".tif"}


def suffix_of(path: Path) -> str:
    """The suffix of what a file holds, whatever it is called."""
    with path.open("rb") as file:
        return _SUFFIXES.get(format_of(file.read(4096)), ".img")


def accepted_format(data: bytes, formats: tuple[str, ...]) -> str:
    """The format of a file; raises UndecodableImage, naming what it is, when it is none of `formats`."""
    return _expect(format_of(data), formats)


def _expect(found: str, formats: tuple[str, ...]) -> str:
    if found in formats:
        return found
    if found in _NAMES:
        found = f"a {_NAMES[found]} picture"
    if not found:
        raise UndecodableImage(f"not an image in an accepted format ({shown(formats)})")
    advice = f"convert it to {' or '.join(_NAMES[name] for name in formats[:2])}"
    raise UndecodableImage(f"{found}, which is not an accepted format ({shown(formats)}); {advice}")


# A marker of a JPEG that ends a scan or begins a segment: no stuffed byte, no restart, no filler.
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


def check_jpeg(data: bytes, accepted: Accepted) -> None:
    """Refuse what a JPEG's own segments say cannot or must not be decoded.

    Walks the picture as a decoder does, so that neither previews inside segments nor what lies behind its end count.
    Raises UndecodableImage.
    """
    place = 2
    frame: tuple[int, int] | None = None
    scans = segments = exif = junk = 0
    while (marker := _MARKER.search(data, place)) is not None:
        if scans == 0:
            junk += marker.start() - place
            if junk > _MAX_JUNK:
                break  # Pillow looks for the picture byte by byte
        code = data[marker.start() + 1]
        if code == 0xD9:
            break
        place = marker.end()
        segments += 1
        if code == 0xD8:
            continue
        (size,) = struct.unpack_from(">H", data, place) if place + 2 <= len(data) else (0,)
        if size < 2:
            break
        body = data[place + 2 : place + 20]
        if code in _FRAMES and frame is None and size >= 8 and len(body) >= 6:
            bits, height, width, channels = struct.unpack_from(">BHHB", body)
            check_pixels(width, height, accepted)
            if bits != 8 or channels not in (1, 3, 4):
                raise UndecodableImage(
                    f"a JPEG of {channels} channels of {bits} bits; accepted are 1, 3 or 4 channels of 8 bits"
                )
            frame = width, height
        elif code == 0xE1 and body.startswith(b"Exif\0\0"):
            exif += 1
        elif code == 0xDA:
            scans += 1
            pixels = frame[0] * frame[1] if frame else 0
            most = min(_MAX_SCANS, max(_MANY_SCANS, _MAX_SCANNED_PIXELS // max(1, pixels)))
            if scans > most:
                raise UndecodableImage(f"a JPEG of more than {most} scans, the most that its size may have; save it again")
        if segments > _MAX_SEGMENTS or exif > _MAX_EXIF_SEGMENTS:
            raise UndecodableImage(f"a JPEG of more than {_MAX_SEGMENTS} segments, or {_MAX_EXIF_SEGMENTS} of them EXIF")
        place += size
    if frame is None or scans == 0:
        raise UndecodableImage("damaged or truncated: a JPEG file that holds no picture")


_PNG_NEEDED = {b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"eXIf", b"acTL", b"fcTL", b"fdAT"}
"""Ancillary chunks that say how pixels are to be understood; of the others only two texts may, see `_turns`."""


def png_essence(data: bytes) -> tuple[bytes, bytes | None]:
    """A PNG without what says nothing about its pixels, and its colour profile: None without one, empty if it is unusable.

    Texts, edit histories and private chunks may be larger than the picture, and are left out unread.
    Raises UndecodableImage.
    """
    kept = [data[:8]]
    place, count, texts = 8, 0, 0
    profile: bytes | None = None
    while place + 12 <= len(data):
        count += 1
        if count > _MAX_CHUNKS:
            raise UndecodableImage(f"a PNG of more than {_MAX_CHUNKS} chunks; save it again")
        (size,) = struct.unpack_from(">I", data, place)
        kind, end = data[place + 4 : place + 8], place + 12 + size
        if end > len(data):
            break
        if not kind[:1].islower() or (kind in _PNG_NEEDED and _intact(data, place, end)):
            kept.append(data[place:end])
        elif kind == b"iCCP" and profile is None:
            profile = _inflated(data[place + 8 : end - 4]) if _intact(data, place, end) else b""
        elif kind in (b"tEXt", b"zTXt", b"iTXt") and texts < _MAX_TEXTS and _keyword(data, place + 8) in _TURNING:
            texts += 1
            if _intact(data, place, end) and _unpacks(kind, data[place + 8 : end - 4]):
                kept.append(data[place:end])
        place = end
        if kind == b"IEND":
            # What lies behind the end is not the picture's.
            return b"".join(kept), profile
    kept.append(data[place:])
    return b"".join(kept), profile


def _intact(data: bytes, start: int, end: int) -> bool:
    checksum: int = struct.unpack_from(">I", data, end - 4)[0]
    return zlib.crc32(memoryview(data)[start + 4 : end - 4]) == checksum


def _inflated(body: bytes) -> bytes:
    """The profile of an iCCP chunk; empty when it is broken or larger than a profile may be."""
    decompressor = zlib.decompressobj()
    try:
        found = decompressor.decompress(body[body.index(b"\0") + 2 :], MAX_PROFILE)
    except (zlib.error, ValueError):
        return b""
    return b"" if decompressor.unconsumed_tail else found


_TURNING = (b"XML:com.adobe.xmp", b"Raw profile type exif")
"""Keywords of the texts that may say which side is up."""
_MAX_TEXTS = 16
_MAX_TEXT = 1 << 20
"""Most bytes that Pillow unpacks of a text."""


def _keyword(data: bytes, start: int) -> bytes:
    return data[start : start + 80].partition(b"\0")[0]


def _unpacks(kind: bytes, body: bytes) -> bool:
    """Whether a text is of a size that Pillow unpacks."""
    rest = body.partition(b"\0")[2]
    packed = b""
    if kind == b"zTXt":
        packed = rest[1:]
    elif kind == b"iTXt" and rest[:1] == b"\1":
        packed = rest[2:].split(b"\0", 2)[-1]
    decompressor = zlib.decompressobj()
    try:
        decompressor.decompress(packed, _MAX_TEXT)
    except zlib.error:
        return True  # which Pillow leaves out
    return not decompressor.unconsumed_tail


def check_pixels(width: int, height: int, accepted: Accepted) -> None:
    """Raise UndecodableImage for a picture that is too large."""
    if width * height > accepted.max_pixels:
        raise UndecodableImage(f"{width}x{height} pixels, accepted are up to {accepted.max_pixels}; make it smaller")


def check_size(num_bytes: int, accepted: Accepted) -> None:
    """Raise UndecodableImage for a file that is too large."""
    if num_bytes > accepted.max_bytes:
        raise UndecodableImage(f"{num_bytes} bytes, accepted are up to {accepted.max_bytes}; make it smaller")


def refusal(num_bytes: int, kind: str, width: int, height: int, accepted: Accepted) -> str:
    """Why a picture that could be decoded is not accepted; empty when it is. `kind` is its format, one of FORMATS."""
    try:
        check_size(num_bytes, accepted)
        _expect(kind, accepted.formats)
        check_pixels(width, height, accepted)
    except UndecodableImage as error:
        return str(error)
    return ""


_PROGRAMS = (("a program", rb"MZ.{58}|\x7fELF|#!"), ("a script in a web page", rb"(?i:.{0,512}?(?:<\?php|<script))"))
_PATTERNS_BEHIND = tuple((name, re.compile(pattern, re.DOTALL)) for name, pattern in _PROGRAMS)


@dataclass(frozen=True)
class Surroundings:
    """What a file holds beside its picture."""

    metadata: int = 0
    """Bytes of profiles, camera settings, texts, edit histories and previews before the picture's end."""
    behind: int = 0
    """Bytes behind the picture's end that are not there to fill."""
    behind_is: str = ""
    """What they are, in words; empty when there are none or it is not known."""


def surroundings(data: bytes, kind: str) -> Surroundings:
    """What a whole picture of this format has around it; nothing for a format whose files do not say where they end."""
    walk = {"JPEG": _around_jpeg, "PNG": _around_png, "WEBP": _around_webp}.get(kind)
    metadata, end = walk(data) if walk is not None else (0, len(data))
    if not data[end:].strip(b"\0\xff\r\n\t "):
        return Surroundings(metadata)
    rest = data[end:].lstrip(b"\0\r\n\t ")
    found = format_of(rest)
    what = f"a {_NAMES[found]} picture" if found in _NAMES else found
    return Surroundings(
        metadata, len(rest), next((name for name, pattern in _PATTERNS_BEHIND if pattern.match(rest[:4096])), what)
    )


def _around_jpeg(data: bytes) -> tuple[int, int]:
    """Bytes of metadata, and where the picture ends: at its end marker, the first outside of a segment."""
    place, metadata = 2, 0
    while (marker := _MARKER.search(data, place)) is not None:
        code = data[marker.start() + 1]
        place = marker.end()
        if code == 0xD9:
            return metadata, place
        if code == 0xD8 or place + 2 > len(data):
            continue
        (size,) = struct.unpack_from(">H", data, place)
        metadata += size if 0xE0 <= code <= 0xEF or code == 0xFE else 0
        place += max(2, size)
    return metadata, len(data)


def _around_png(data: bytes) -> tuple[int, int]:
    place, metadata = 8, 0
    while place + 12 <= len(data):
        (size,) = struct.unpack_from(">I", data, place)
        kind = data[place + 4 : place + 8]
        metadata += size if kind[:1].islower() and kind != b"tRNS" else 0
        place += 12 + size
        if kind == b"IEND":
            return metadata, min(place, len(data))
    return metadata, len(data)


def _around_webp(data: bytes) -> tuple[int, int]:
    end = min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    place, metadata = 12, 0
    while place + 8 <= end:
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        metadata += size if data[place : place + 4] in (b"ICCP", b"EXIF", b"XMP ") else 0
        place += 8 + size + size % 2
    return metadata, end
