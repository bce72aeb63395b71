"""LeNet-5 (LeCun et al. 1998): two convolutions and two hidden layers for grey pictures of 32 pixels.

With ReLU and max pooling, as it is trained today; the last layer, of as many outputs as there are classes, is the task's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from components.contracts.errors import WeightsUnavailable
from components.contracts.models import Preprocessing

if TYPE_CHECKING:
    import torch


class Backbone(BaseModel):
    """About 60,000 parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(
            channels=1, height=32, width=32, resize_shortest=32, interpolation="bilinear", mean=(0.5,), std=(0.5,)
        )

    @property
    def embedding_dim(self) -> int:
        return 84

    @property
    def weights_choices(self) -> tuple[str, ...]:
        return ()

    def build(self) -> torch.nn.Module:
        from torch import nn

        return nn.Sequential(
            *(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()),
        )

    def blocks(self, module: torch.nn.Module) -> list[torch.nn.Module]:
        """Each convolution with its pooling, and each hidden layer."""
        from torch import nn

        assert isinstance(module, nn.Sequential)
        return [module[:3], module[3:6], module[6:9], module[9:]]

    def pretrained(self, weights: str, *, cache: Path) -> dict[str, torch.Tensor]:
        raise WeightsUnavailable(f"lenet5 has no pretrained weights ({weights!r}); set training.weights=random")
