"""Phases of a training: what of the network trains, on which pictures, with which loss, for how long."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from components import plugins
from components.contracts import families
from components.contracts.errors import ConfigError
from components.contracts.records import Record, canonical_json
from components.features import AS_IT_IS
from components.fitting import FittingConfig, LossFunction, Mix

if TYPE_CHECKING:
    import torch


class Augmentation(Record):
    """Random geometric changes of a training image; all zero for none."""

    rotate_degrees: float = Field(default=0.0, ge=0, le=180)
    translate: float = Field(default=0.0, ge=0, le=0.5)
    """Largest shift as a share of the side."""
    scale: float = Field(default=0.0, ge=0, le=0.5)
    shear: float = Field(default=0.0, ge=0, le=0.5)
    horizontal_flip: bool = False

    @property
    def active(self) -> bool:
        return self.horizontal_flip or max(self.rotate_degrees, self.translate, self.scale, self.shear) > 0

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """uint8 (n, h, w, c) to the same shape, one random affine map per image; borders repeat."""
        import torch
        from torch.nn import functional

        def uniform(limit: float) -> torch.Tensor:
            return (torch.rand(len(images), generator=generator) * 2 - 1) * limit

        angle = uniform(math.radians(self.rotate_degrees))
        zoom, shear = 1 + uniform(self.scale), uniform(self.shear)
        mirror = torch.ones(len(images))
        if self.horizontal_flip:
            mirror = (torch.rand(len(images), generator=generator) < 0.5).float() * 2 - 1
        cosine, sine = torch.cos(angle) * zoom, torch.sin(angle) * zoom
        rows_xy = torch.stack(
            [
                torch.stack([cosine * mirror, (shear - sine), uniform(2 * self.translate)], dim=1),
                torch.stack([sine * mirror, cosine, uniform(2 * self.translate)], dim=1),
            ],
            dim=1,
        )
        planes = images.permute(0, 3, 1, 2).float()
        grid = functional.affine_grid(rows_xy, list(planes.shape), align_corners=False)
        moved = functional.grid_sample(planes, grid, padding_mode="border", align_corners=False)
        return moved.round().to(torch.uint8).permute(0, 2, 3, 1)


class LastBlocks(Record):
    """The last blocks of the backbone, and the head."""

    last: int = Field(ge=1, le=1000)

    def __str__(self) -> str:
        return f"last {self.last}"


class ChosenLoss(Record):
    """A loss and its settings."""

    loss: str
    settings: dict[str, bool | int | float | str] = {}

    def load(self) -> families.Loss:
        found: families.Loss = plugins.load("losses", self.loss, dict(self.settings))
        return found


class ChosenAugmentation(Record):
    """An augmentation and its settings."""

    augmentation: str
    settings: dict[str, Any] = {}

    def load(self) -> families.Augmentation:
        found: families.Augmentation = plugins.load("augmentations", self.augmentation, dict(self.settings))
        return found


class Phase(Record):
    """One fit: what of the network trains, on which images, for how long.

    What lies below the part that trains is computed once for every picture and view, and cached. The first view is the
    picture as it is; each further one is drawn once by the augmentations that change pictures. Those that mix examples act
    on every batch anew, as all augmentations do where everything trains.
    """

    trains: Literal["head", "all"] | LastBlocks
    """`head`, `all`, or `{last: 2}` for the last two blocks of the backbone and the head."""
    augmentation: Augmentation = Augmentation()
    augmentations: tuple[ChosenAugmentation, ...] = ()
    """Applied in this order, after `augmentation`."""
    views: int = Field(default=1, ge=1, le=64)
    """How many views of each picture are cached where a part is frozen."""
    loss: ChosenLoss | None = None
    """None for the task's own."""
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    """`balanced` draws every class equally often."""
    fit: FittingConfig = FittingConfig()

    @property
    def part(self) -> str:
        """What trains, in words."""
        if isinstance(self.trains, LastBlocks):
            return "the last block" if self.trains.last == 1 else f"the last {self.trains.last} blocks"
        return {"head": "the head", "all": "everything"}[self.trains]

    @property
    def changes(self) -> bool:
        """Whether single pictures are changed."""
        return self.augmentation.active or any(not chosen.load().mixes for chosen in self.augmentations)

    @property
    def mixes(self) -> bool:
        """Whether the examples of a batch are mixed."""
        return any(chosen.load().mixes for chosen in self.augmentations)

    def change(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """uint8 (n, h, w, c) to the same shape, every picture changed by a draw of its own."""
        if self.augmentation.active:
            images = self.augmentation(images, generator)
        for chosen in self.augmentations:
            if not (augmentation := chosen.load()).mixes:
                images = augmentation.change(images, generator)
        return images

    def view(self, number: int, images: npt.NDArray[np.uint8], pictures: Sequence[str]) -> npt.NDArray[np.uint8]:
        """The view of this number of images (n, h, w, c): the same for a picture digest, whatever lies beside it."""
        import torch

        if number == 0:
            return images
        found = []
        for image, picture in zip(images, pictures, strict=True):
            seed = hashlib.sha256(f"{number} {picture}".encode()).digest()[:7]
            generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
            found.append(self.change(torch.from_numpy(image[None]), generator).numpy())
        return np.concatenate(found)

    def view_name(self, number: int) -> str:
        """What a view depends on besides the pixels: the same name for the same draws."""
        if number == 0:
            return AS_IT_IS.name
        used = {chosen.augmentation for chosen in self.augmentations}
        facts = [
            number,
            self.augmentation.to_json(),
            [chosen.to_json() for chosen in self.augmentations if not chosen.load().mixes],
            {name: plugins.member_digest("augmentations", name) for name in sorted(used)},
        ]
        return hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:32]

    def mixer(self, num_classes: int, *, channels_last: bool) -> Mix | None:
        """What mixes the inputs and the class numbers (n,) of a batch; None where nothing does."""
        chosen = [augmentation for one in self.augmentations if (augmentation := one.load()).mixes]
        if not chosen:
            return None
        return functools.partial(_mix, chosen, num_classes, channels_last)

    def loss_on(self, counts: torch.Tensor) -> LossFunction | None:
        """The phase's own loss, given the number of training images of each class (classes,); None for the task's."""
        return None if self.loss is None else functools.partial(self.loss.load().loss, counts=counts)


def _mix(
    augmentations: Sequence[families.Augmentation],
    num_classes: int,
    channels_last: bool,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    from torch.nn import functional

    shares = functional.one_hot(targets, num_classes).float()
    for augmentation in augmentations:
        inputs, shares = augmentation.mix(inputs, shares, generator, channels_last=channels_last)
    return inputs, shares


def check(phase: Phase, place: str, task: families.Task) -> None:
    """Raise ConfigError for a phase that cannot work; `place` is where the recipe keeps it."""
    frozen = phase.trains != "all"
    loss = phase.loss.load() if phase.loss is not None else None
    for chosen in phase.augmentations:
        chosen.load()
    if (loss is not None or phase.mixes or phase.sampling == "balanced") and not getattr(task, "one_class", False):
        raise ConfigError(
            f"{place}: a loss of its own, balanced sampling and mixing need a task with one class an image; remove them"
        )
    if phase.mixes and loss is not None and not loss.takes_shares:
        mixing = next(chosen.augmentation for chosen in phase.augmentations if chosen.load().mixes)
        raise ConfigError(
            f"{place}: {mixing} makes targets that are shares of classes, and the loss {phase.loss.loss!r} "  # type: ignore[union-attr]
            f"takes class numbers alone; choose another loss, such as cross_entropy, or remove {mixing}"
        )
    needing = [chosen.augmentation for chosen in phase.augmentations if (one := chosen.load()).mixes and one.needs_space]
    if needing and phase.trains == "head":
        raise ConfigError(
            f"{place}: {needing[0]} cuts pieces out of pictures or maps, and with trains: head there are only features; "
            f"remove it, or train the last blocks"
        )
    if frozen and phase.changes and phase.views == 1:
        how = "mode: frozen" if place == "training" else f"trains: {phase.trains}, and one view of each picture"
        raise ConfigError(
            f"{place}.augmentation has no effect with {how}: what is frozen is computed once; remove it, or set views to 2 "
            f"or more in a phase of training.phases"
        )
    if frozen and phase.views > 1 and not phase.changes:
        raise ConfigError(
            f"{place}.views: {phase.views} views of each picture would be the same; name "
            f"augmentations, such as flip, or remove it"
        )
    if not frozen and phase.views > 1:
        raise ConfigError(
            f"{place}.views has no effect with trains: all: every picture is changed anew in every epoch; remove it"
        )
