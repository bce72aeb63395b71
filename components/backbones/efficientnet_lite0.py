"""EfficientNet-Lite0: 1280-d features for photographs, made for CPUs and int8."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from components.backbones._lite import Lite


class Backbone(Lite):
    """3.4 million parameters."""

    number: ClassVar[int] = 0
    depth: ClassVar[int] = 16
    packaged_sha256: ClassVar[str] = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

    image_size: int = Field(default=224, ge=64, le=512, multiple_of=32)
    crop_share: float = Field(default=0.875, ge=0.5, le=1)
