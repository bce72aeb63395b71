"""EfficientNet-Lite1: deeper than Lite0, on pictures of 240 pixels."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from components.backbones._lite import Lite


class Backbone(Lite):
    """4.1 million parameters."""

    number: ClassVar[int] = 1
    depth: ClassVar[int] = 21
    packaged_sha256: ClassVar[str] = "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"

    image_size: int = Field(default=240, ge=64, le=512, multiple_of=4)
    crop_share: float = Field(default=0.882, ge=0.5, le=1)
