"""EfficientNet-Lite2: wider and deeper than Lite0, on pictures of 260 pixels."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from components.backbones._lite import Lite


class Backbone(Lite):
    """4.8 million parameters."""

    number: ClassVar[int] = 2
    depth: ClassVar[int] = 21
    packaged_sha256: ClassVar[str] = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"

    image_size: int = Field(default=260, ge=64, le=512, multiple_of=4)
    crop_share: float = Field(default=0.89, ge=0.5, le=1)
