"""Phases of a training: what of the network trains, on which pictures, with which loss, for how long."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from components import plugins
from components.computed_heads import HeadKind
from components.contracts import families
from components.contracts.errors import ConfigError
from components.contracts.records import Record, canonical_json, sha256_text
from components.features import AS_IT_IS, View
from components.fitting import Augment, FittingConfig, LossFunction, Mix

if TYPE_CHECKING:
    import torch
    from torch import nn


class Augmentation(Record):
    """The settings of the augmentation `affine`, as recipes of one phase say them; all zero for none."""

    rotate_degrees: float = Field(default=0.0, ge=0, le=180)
    translate: float = Field(default=0.0, ge=0, le=0.5)
    """Largest shift as a share of the side."""
    scale: float = Field(default=0.0, ge=0, le=0.5)
    shear: float = Field(default=0.0, ge=0, le=0.5)
    horizontal_flip: bool = False

    @property
    def active(self) -> bool:
        return self.horizontal_flip or max(self.rotate_degrees, self.translate, self.scale, self.shear) > 0


class LastBlocks(Record):
    """The last blocks of the backbone, and the head."""

    last: int = Field(ge=1, le=1000)


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
    batch_norm: Literal["trains", "frozen"] | None = None
    """`frozen` keeps the statistics, scales and shifts of batch normalisation as they came; None for `frozen` with the last
    blocks, and `trains` with everything.

    The statistics of a few hundred pictures are worse than those of the million that pretrained weights saw.
    """
    fit: FittingConfig = FittingConfig()
    head: HeadKind | None = None
    """For few pictures of each class: the head is computed in one step (components/computed_heads.py), as class means
    (`prototype`), ridge regression (`linear`), or what is seen to do better on pictures that are left out (`auto`).

    Left out of JSON where it is fitted in steps, so that what an older recipe makes keeps its digest."""

    @model_serializer(mode="wrap")
    def _as_ever(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        if self.head is None:
            del values["head"]
        return values

    @field_validator("trains", mode="before")
    @classmethod
    def _something(cls, given: Any) -> Any:
        last = given.get("last") if isinstance(given, dict) and set(given) <= {"last", "schema_version"} else None
        known = given in ("head", "all") or isinstance(given, LastBlocks) or (type(last) is int and 1 <= last <= 1000)
        if not known:
            raise ValueError(f"{given!r} trains nothing; expected head, all, or {{last: N}} with N of 1 or more blocks")
        return given

    @property
    def part(self) -> str:
        """What trains, in words."""
        if isinstance(self.trains, LastBlocks):
            return "the last block" if self.trains.last == 1 else f"the last {self.trains.last} blocks"
        head = "the head" if self.head is None else "the head, computed in one step"
        return {"head": head, "all": "everything"}[self.trains]

    def kept(self, part: nn.Module) -> list[nn.Module]:
        """The modules of what trains that stay as they came."""
        from torch.nn.modules.batchnorm import _BatchNorm

        frozen = self.batch_norm == "frozen" or (self.batch_norm is None and isinstance(self.trains, LastBlocks))
        return [module for module in part.modules() if isinstance(module, _BatchNorm)] if frozen else []

    @property
    def all_augmentations(self) -> tuple[ChosenAugmentation, ...]:
        """All of them in their order, however they were said."""
        if not self.augmentation.active:
            return self.augmentations
        settings = self.augmentation.model_dump(exclude={"schema_version"})
        return (ChosenAugmentation(augmentation="affine", settings=settings), *self.augmentations)

    def _chosen(self, *, mixing: bool) -> list[tuple[ChosenAugmentation, families.Augmentation]]:
        """Those that mix examples, or those that change single pictures."""
        return [(one, member) for one in self.all_augmentations if (member := one.load()).mixes == mixing]

    @property
    def changes(self) -> bool:
        """Whether single pictures are changed."""
        return bool(self._chosen(mixing=False))

    @property
    def mixes(self) -> bool:
        """Whether the examples of a batch are mixed."""
        return bool(self._chosen(mixing=True))

    @property
    def needing_space(self) -> list[str]:
        """The augmentations that take what has height and width."""
        return [one.augmentation for one, member in self._chosen(mixing=True) if member.needs_space]

    def changer(self) -> Augment | None:
        """What changes uint8 images (n, h, w, c), every picture by a draw of its own; None where nothing does."""
        members = [member for _, member in self._chosen(mixing=False)]
        return functools.partial(_change, members) if members else None

    def cached_views(self) -> list[View]:
        """The views of a picture that are cached where a part is frozen; the first is the picture as it is."""
        changer = self.changer()
        if changer is None:
            return [AS_IT_IS]
        chosen = [one for one, _ in self._chosen(mixing=False)]
        digests = {one.augmentation: plugins.member_digest("augmentations", one.augmentation) for one in chosen}
        drawn = canonical_json([[one.to_json() for one in chosen], digests])
        return [
            AS_IT_IS,
            *(
                View(sha256_text(f"{number} {drawn}")[:32], functools.partial(_view, changer, number))
                for number in range(1, self.views)
            ),
        ]

    def mixer(self, num_classes: int, *, channels_last: bool) -> Mix | None:
        """What mixes the inputs and the class numbers (n,), or shares (n, ...), of a batch; None where nothing does."""
        members = [member for _, member in self._chosen(mixing=True)]
        return functools.partial(_mix, members, num_classes, channels_last) if members else None

    def loss_on(self, counts: torch.Tensor) -> LossFunction | None:
        """The phase's own loss, given the number of training images of each class (classes,); None for the task's."""
        return None if self.loss is None else functools.partial(self.loss.load().loss, counts=counts)


def _change(
    augmentations: Sequence[families.Augmentation], images: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    for augmentation in augmentations:
        images = augmentation.change(images, generator)
    return images


def _view(changer: Augment, number: int, images: npt.NDArray[np.uint8], pictures: Sequence[str]) -> npt.NDArray[np.uint8]:
    """The draw of this number of each image (n, h, w, c): the same for a picture digest, whatever lies beside it."""
    import torch

    found = []
    for image, picture in zip(images, pictures, strict=True):
        seed = hashlib.sha256(f"{number} {picture}".encode()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
        found.append(changer(torch.from_numpy(image[None]), generator).numpy())
    return np.concatenate(found)


def _mix(
    augmentations: Sequence[families.Augmentation],
    num_classes: int,
    channels_last: bool,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    from torch.nn import functional

    shares = targets if targets.is_floating_point() else functional.one_hot(targets, num_classes).float()
    for augmentation in augmentations:
        inputs, shares = augmentation.mix(inputs, shares, generator, channels_last=channels_last)
    return inputs, shares


def check(phase: Phase, place: str, task: families.Task) -> None:
    """Raise ConfigError for a phase that cannot work; `place` is where the recipe keeps it."""
    frozen = phase.trains != "all"
    if phase.batch_norm is not None and phase.trains == "head":
        raise ConfigError(f"{place}.batch_norm has no effect with trains: head, which has no batch normalisation; remove it")
    chosen = [(one.augmentation, one.load()) for one in phase.all_augmentations]
    if phase.head is not None:
        _check_computed(phase, place, task, [name for name, member in chosen if member.mixes])
    mixing = [(name, member) for name, member in chosen if member.mixes]
    if (phase.loss or mixing or phase.sampling == "balanced") and not getattr(task, "one_class", False):
        raise ConfigError(
            f"{place}: a loss of its own, balanced sampling and mixing need a task with one class an image; remove them"
        )
    if phase.loss is not None and not phase.loss.load().takes_shares and mixing:
        raise ConfigError(
            f"{place}: {mixing[0][0]} makes targets that are shares of classes, and the loss {phase.loss.loss!r} "
            f"takes class numbers alone; choose another loss, such as cross_entropy, or remove {mixing[0][0]}"
        )
    needing = phase.needing_space
    if needing and phase.trains == "head":
        raise ConfigError(
            f"{place}: {needing[0]} cuts pieces out of pictures or maps, and with trains: head there are only features; "
            f"remove it, or train the last blocks"
        )
    changes = len(mixing) < len(chosen)
    if frozen and changes and phase.views == 1:
        how = "mode: frozen" if place == "training" else f"one view of each picture, with {phase.part} training"
        raise ConfigError(
            f"{place}.augmentation has no effect with {how}: what is frozen is computed once; remove it, or set views to 2 "
            f"or more in a phase of training.phases"
        )
    if frozen and phase.views > 1 and not changes:
        raise ConfigError(
            f"{place}.views: {phase.views} views of each picture would be the same; name "
            f"augmentations, such as flip, or remove it"
        )
    if not frozen and phase.views > 1:
        raise ConfigError(
            f"{place}.views has no effect with trains: all: every picture is changed anew in every epoch; remove it"
        )


def _check_computed(phase: Phase, place: str, task: families.Task, mixing: Sequence[str]) -> None:
    """Raise ConfigError where a head is to be computed that cannot be, or by settings that are about steps."""
    if phase.trains != "head":
        raise ConfigError(f"{place}.head: {phase.head} computes a head on frozen features; say trains: head, or remove it")
    if not getattr(task, "one_class", False):
        raise ConfigError(f"{place}.head: {phase.head} needs a task with one class an image; remove it")
    of_steps = [key for key in ("fit", "loss", "sampling") if getattr(phase, key) != Phase.model_fields[key].default]
    of_steps += [f"augmentation {name}" for name in mixing]
    if of_steps:
        raise ConfigError(
            f"{place}: {' and '.join(of_steps)} {'has' if len(of_steps) == 1 else 'have'} no effect with head: "
            f"{phase.head}, which takes no steps and has every class count alike; remove "
            f"{'it' if len(of_steps) == 1 else 'them'}"
        )
