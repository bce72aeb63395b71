"""Any architecture of timm by its name, without its classifier; weights are downloaded once from where timm keeps them."""

from __future__ import annotations

import difflib
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from components.contracts.errors import WeightsUnavailable
from components.contracts.models import Preprocessing

if TYPE_CHECKING:
    import torch


class Backbone(BaseModel):
    """For example `architecture: convnext_tiny.fb_in22k_ft_in1k`, with `training.weights: timm`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str = "resnet50.a1_in1k"
    """As timm names it; after the point the weights, whose input contract is followed: size, crop, mean and std."""
    image_size: int | None = Field(default=None, ge=32, le=1024)
    """Side of the crop in pixels; that of the weights where it is not said."""

    @field_validator("architecture")
    @classmethod
    def _known(cls, name: str) -> str:
        import timm

        if not timm.is_model(name):
            stem = name.split(".")[0]
            near = difflib.get_close_matches(stem, timm.list_models(), n=5, cutoff=0.5)
            raise ValueError(f"timm has no architecture {name!r}; near it: {', '.join(near) or '(none)'}")
        if "." in name and name not in timm.list_pretrained():
            weights = timm.list_pretrained(f"{name.split('.')[0]}.*")
            raise ValueError(f"timm has no weights {name!r}; valid: {', '.join(weights) or '(none)'}")
        return name

    @property
    def embedding_dim(self) -> int:
        return _num_features(self.architecture, self.image_size)

    @property
    def preprocessing(self) -> Preprocessing:
        contract = _contract(self.architecture)
        channels, crop, _ = contract["input_size"]
        crop = self.image_size or crop
        return Preprocessing(
            channels=channels,
            height=crop,
            width=crop,
            resize_shortest=max(crop, int(crop / contract["crop_pct"])),
            interpolation="bilinear" if contract["interpolation"] == "bilinear" else "bicubic",
            mean=tuple(contract["mean"]),
            std=tuple(contract["std"]),
        )

    @property
    def weights_choices(self) -> tuple[str, ...]:
        return ("timm",)

    def build(self) -> torch.nn.Module:
        """Normalised float images (n, c, h, w) to features (n, embedding_dim)."""
        return _made(self.architecture, self.image_size)

    def blocks(self, module: torch.nn.Module) -> list[torch.nn.Module]:
        """The network's stages or layers; [] where its kind is not known."""
        from components.backbones._division import divided

        return divided(module)

    def pretrained(self, weights: str, *, cache: Path) -> dict[str, torch.Tensor]:
        """`timm`: the safetensors file on the hub that timm names for these weights."""
        import timm

        from components.weights import download, from_safetensors

        found = timm.get_pretrained_cfg(self.architecture)
        if found is None or not found.hf_hub_id:
            raise WeightsUnavailable(f"timm names no weights on the hub for {self.architecture}; choose another, or random")
        repository = found.hf_hub_id
        if repository.endswith("/"):
            repository += ".".join(filter(None, (found.architecture, found.tag)))
        # A file that holds tensors alone: it is opened by no interpreter, and timm names no digest of it.
        url = f"https://huggingface.co/{repository}/resolve/main/model.safetensors"
        folder = cache / "timm" / repository.replace("/", "--")
        state = from_safetensors(download(url, sha256="", cache=folder))
        names = self.build().state_dict().keys()
        missing = sorted(names - state.keys())
        if missing:
            raise WeightsUnavailable(f"{url} does not fit {self.architecture}: it holds no {missing[0]}")
        return {name: state[name] for name in names}


def _contract(architecture: str) -> dict[str, Any]:
    import timm
    from timm.data import resolve_data_config

    found = timm.get_pretrained_cfg(architecture)
    contract: dict[str, Any] = resolve_data_config(pretrained_cfg=found.to_dict() if found is not None else {})
    return contract


def _made(architecture: str, image_size: int | None) -> torch.nn.Module:
    import timm

    sized = {} if image_size is None else {"img_size": image_size}
    try:
        module: torch.nn.Module = timm.create_model(architecture, pretrained=False, num_classes=0, **sized)
    except TypeError:
        # Convolutions take any size, and their networks no such setting.
        module = timm.create_model(architecture, pretrained=False, num_classes=0)
    return module


@functools.cache
def _num_features(architecture: str, image_size: int | None) -> int:
    import torch

    with torch.device("meta"):
        module: Any = _made(architecture, image_size)
    return int(getattr(module, "head_hidden_size", None) or module.num_features)
