"""A backbone: two convolutions and the mean over what is left of the picture.

Build your own network in `build` instead; `preprocessing` says what it is given. `visionloop plugin check` tries it; a
recipe names it as `training.backbone`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from components.contracts.errors import WeightsUnavailable
from components.contracts.models import Preprocessing

if TYPE_CHECKING:
    import torch

NAME = "template"


class Backbone(BaseModel):
    """Grey pictures of 32 pixels; about 5,000 parameters at width 16."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int = Field(default=16, ge=4, le=256)
    """Channels of the first convolution; the features are twice as many."""

    @property
    def preprocessing(self) -> Preprocessing:
        """What a file is made into before the network sees it."""
        return Preprocessing(
            channels=1, height=32, width=32, resize_shortest=32, interpolation="bilinear", mean=(0.5,), std=(0.5,)
        )

    @property
    def embedding_dim(self) -> int:
        """Length of a picture's features."""
        return 2 * self.width

    @property
    def weights_choices(self) -> tuple[str, ...]:
        """Names of pretrained weights; none: it trains from scratch."""
        return ()

    def build(self) -> torch.nn.Module:
        """Normalised float images (n, 1, 32, 32) to features (n, embedding_dim)."""
        from torch import nn

        return nn.Sequential(
            nn.Conv2d(1, self.width, 3, padding=1, bias=False),
            nn.BatchNorm2d(self.width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(self.width, self.embedding_dim, 3, padding=1, bias=False),
            nn.BatchNorm2d(self.embedding_dim),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )

    def blocks(self, module: torch.nn.Module) -> list[torch.nn.Module]:
        """The parts of `build`'s module, first to last, whose last ones can train alone; may be left out."""
        from torch import nn

        assert isinstance(module, nn.Sequential)
        return [module[:4], module[4:]]

    def pretrained(self, weights: str, *, cache: Path) -> dict[str, torch.Tensor]:
        """Raises WeightsUnavailable: there are none."""
        raise WeightsUnavailable(f"{NAME} has no pretrained weights ({weights!r}); set training.weights=random")
