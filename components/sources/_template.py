"""A source of images: grey circles and squares, drawn one by one.

Draw, read or download your own pictures in `fetch` instead: one folder per class, and the same bytes on every machine.
`visionloop plugin check` tries it, `visionloop data add --source` uses it.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw
from pydantic import BaseModel, ConfigDict, Field


class Source(BaseModel):
    """32x32 BMP files: uncompressed, so their bytes do not depend on a compression library."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    per_class: int = Field(default=40, ge=1, le=1000)
    """Pictures of each class."""

    def fetch(self, *, out: Path) -> None:
        """Write `out/<class>/<number>.bmp`; no two pictures are equal."""
        for name in ("circle", "square"):
            folder = out / name
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(self.per_class):
                left, top, shade = 2 + index % 9, 2 + index % 11, 100 + 10 * (index % 13)
                image = Image.new("L", (32, 32), 20)
                draw = ImageDraw.Draw(image).ellipse if name == "circle" else ImageDraw.Draw(image).rectangle
                draw((left, top, left + 16, top + 16), fill=shade)
                image.save(folder / f"{index:04d}.bmp", format="BMP")
