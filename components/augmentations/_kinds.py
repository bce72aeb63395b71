"""The two kinds of augmentations, and what each has of the family's protocol without doing anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch


class OfPictures(BaseModel):
    """Changes each picture by `change`, and mixes nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def mixes(self) -> bool:
        return False

    @property
    def needs_space(self) -> bool:
        return True

    def mix(
        self, inputs: torch.Tensor, shares: torch.Tensor, generator: torch.Generator, *, channels_last: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch as it is."""
        return inputs, shares


class OfBatches(BaseModel):
    """Mixes the examples of a batch by `mix`, and changes no picture."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def mixes(self) -> bool:
        return True

    def change(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The images as they are."""
        return images
