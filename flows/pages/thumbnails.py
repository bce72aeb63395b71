"""Pictures as pages show them: upright, in sRGB, no larger than asked."""

from __future__ import annotations

import io

from components.images import decode

_TINY = 96
"""Pictures up to this side are shown as they are, without loss."""
_MAX_JPEG_SIDE = 65_500


def encoded(data: bytes, side: int | None = None) -> bytes:
    """A picture as PNG, or as JPEG where it is not tiny, its longer side at most `side`; raises UndecodableImage."""
    image = decode(data).srgb()
    image.info = {}  # comments, places and profiles are not the picture
    lossless = max(image.size) <= _TINY
    if side is not None and max(image.size) > side:
        image.thumbnail((side, side))
    made = io.BytesIO()
    if lossless or max(image.size) > _MAX_JPEG_SIDE:
        image.save(made, format="PNG")
    else:
        image.save(made, format="JPEG", quality=85)
    return made.getvalue()


def media_type(data: bytes) -> str:
    """What a picture that `encoded` made is called in a header."""
    return "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"
