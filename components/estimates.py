"""What a training would take: of each phase what it trains on, what of that is cached, and about how long, measured here.

Nothing is trained to the end and nothing of a workspace is written: what has to be made to be timed is made in a temporary
folder. A row of a cache is timed on a few real images, a step on real steps, on random numbers of the shape that the phase
takes.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from components import plugins
from components.compute import resolve
from components.contracts.errors import TrainingDiverged, UndecodableImage
from components.contracts.families import Backbone, Task
from components.contracts.models import Preprocessing
from components.features import Frozen, engine, folder_of, row_of, rows_of
from components.fitting import Examples, predict
from components.hooks import Checkpointing, Fitting, Hook
from components.images import decode
from components.phases import Phase
from components.pictures import folder_of as pictures_folder
from components.pictures import load_all
from components.segments import names_in
from components.training import CHAMPION, TrainingConfig, fit_phase, initial, logits_of, parameter_groups, part_of
from components.weights import WeightsNotHere, without_downloads

if TYPE_CHECKING:
    import torch
    from torch import nn

    from components.checkpoints import ImageModel

_ENOUGH_S = 1.0
"""So long one thing is timed, as far as there is enough of it."""
_MOST_STEPS = 100
_MOST_SAMPLED = 512
_FIRST = 16


@dataclass(frozen=True)
class Images:
    """What is known of the images that a training would take; paths with their picture digests."""

    classes: tuple[str, ...]
    train: Sequence[tuple[Path, str]]
    valid: Sequence[tuple[Path, str]]
    num_train: int
    num_valid: int
    split: bool
    """Whether they are split already. If not, both numbers are estimates, and `train` are any images, without a digest."""


@dataclass(frozen=True)
class PhaseEstimate:
    """What a phase would take."""

    number: int
    part: str
    """What trains, in words."""
    num_train: int
    num_valid: int
    views: int
    epochs: int
    """At most: it may stop earlier. 0 for a head that is computed in one step, whose time is not looked at."""
    num_steps: int
    """Of one epoch."""
    batch_size: int
    kind: Literal["pictures", "maps", "features"]
    """What is cached for it."""
    num_rows: int
    """So many rows of that it needs, one for each image and view."""
    num_cached: int | None
    """So many of these are there when it begins; None where that is not known, and `unknown` says why."""
    unknown: str
    row_s: float | None
    """Seconds for a row that is not there; None where it was not timed, and 0 where all are there."""
    num_rows_timed: int
    step_s: float | None
    """Seconds for a step; None where it could not be timed."""
    num_steps_timed: int
    valid_s: float | None
    """Seconds for the answer to one image."""

    @property
    def rows_s(self) -> float | None:
        """About so many seconds for the rows that are not there."""
        return None if self.row_s is None else self.row_s * (self.num_rows - (self.num_cached or 0))

    @property
    def fit_s(self) -> float | None:
        """About so many seconds for all epochs."""
        if self.step_s is None or self.valid_s is None:
            return None
        return self.epochs * (self.num_steps * self.step_s + self.num_valid * self.valid_s)

    @property
    def seconds(self) -> float | None:
        """About so many in all; None where a part of it is not known."""
        return None if self.rows_s is None or self.fit_s is None else self.rows_s + self.fit_s


def estimate(
    config: TrainingConfig, images: Images, *, cache: Path, root: Path, num_threads: int, scratch: Path
) -> list[PhaseEstimate]:
    """One a phase, in order. `cache` is only read, `scratch` an empty folder to write into.

    Raises what a training would raise before its first step: ConfigError, WeightsUnavailable, DataDiffers.
    """
    import torch

    torch.set_num_threads(num_threads)
    backbone: Backbone = plugins.load("backbones", config.backbone, dict(config.backbone_settings))
    task: Task = plugins.load("tasks", config.task, dict(config.task_settings))
    classes = task.classes(images.classes)
    _link(cache, scratch)
    unknown = ""
    if config.weights == CHAMPION:
        unknown = "the champion that it goes on from is looked up by the run"
    try:
        begun = config.model_copy(update={"weights": "random"}) if unknown else config
        with without_downloads():
            model, _ = initial(begun, classes, cache=scratch, root=root)
    except WeightsNotHere as error:
        unknown = str(error)
        model, _ = initial(config.model_copy(update={"weights": "random"}), classes, cache=scratch, root=root)
    found = []
    made: set[Path] = set()  # folders of a cache that earlier phases fill
    changed = 0  # blocks of the backbone, from the last, that earlier phases train
    for number, phase in enumerate(config.all_phases, 1):
        part, num_blocks = part_of(config, backbone, phase, model)
        told = unknown
        if changed > num_blocks:
            told = told or "an earlier phase changes what they are made by"
        if phase.trains == "all":
            rows = _pictures(images, backbone.preprocessing, made, cache)
        else:
            frozen = Frozen(config.backbone, backbone, model.backbone.state_dict(), num_blocks)
            rows = _frozen(phase, images, frozen, told, made, cache=cache, scratch=scratch, num_threads=num_threads)
        row_s, num_rows_timed = _row_seconds(rows)
        steps: tuple[float | None, float | None, int] = (0.0, 0.0, 0)
        if phase.head is None:
            steps = _step_seconds(config, number, backbone, model, part, images, rows, task, scratch)
        found.append(
            PhaseEstimate(
                number=number,
                part=phase.part,
                num_train=images.num_train,
                num_valid=images.num_valid,
                views=rows.num_views,
                epochs=phase.fit.epochs if phase.head is None else 0,
                num_steps=math.ceil(images.num_train / phase.fit.batch_size) if phase.head is None else 0,
                batch_size=min(phase.fit.batch_size, images.num_train),
                kind=rows.kind,
                num_rows=rows.num,
                num_cached=rows.num_cached,
                unknown=rows.unknown,
                row_s=row_s,
                num_rows_timed=num_rows_timed,
                step_s=steps[0],
                num_steps_timed=steps[2],
                valid_s=steps[1],
            )
        )
        changed = 10**9 if phase.trains == "all" else max(changed, num_blocks)
    return found


def _link(cache: Path, scratch: Path) -> None:
    """Let weights, and engines of frozen parts, that lie in a cache be found in `scratch` too."""
    for folder in cache.glob("*"):
        if folder.is_dir() and folder.name not in ("features", "maps", "pictures"):
            for place, _, files in os.walk(folder):
                here = scratch / Path(place).relative_to(cache)
                here.mkdir(parents=True, exist_ok=True)
                for name in files:
                    (here / name).symlink_to(Path(place, name).resolve())


@dataclass(frozen=True)
class _Rows:
    """The rows that a phase takes from a cache."""

    kind: Literal["pictures", "maps", "features"]
    shape: tuple[int, ...]
    dtype: str
    num_views: int
    num: int
    num_cached: int | None
    unknown: str
    lacking: Sequence[tuple[Path, str]]
    """Images of which a row is not there, as far as they are known."""
    computing: Callable[[], Callable[[Sequence[tuple[Path, str]]], object]]
    """Makes ready what computes the rows of images, in all views."""


def _pictures(images: Images, contract: Preprocessing, made: set[Path], cache: Path) -> _Rows:
    shape = (contract.height, contract.width, contract.channels)
    num, num_cached, lacking = _there(images, [pictures_folder(contract, cache)], made)
    unknown = _NOT_SPLIT if num_cached is None else ""
    return _Rows(
        "pictures", shape, "uint8", 1, num, num_cached, unknown, lacking, lambda: lambda some: list(load_all(some, contract))
    )


def _frozen(
    phase: Phase,
    images: Images,
    frozen: Frozen,
    unknown: str,
    made: set[Path],
    *,
    cache: Path,
    scratch: Path,
    num_threads: int,
) -> _Rows:
    views = phase.cached_views()
    shape, dtype = row_of(frozen)
    folder = folder_of(frozen, cache)
    num, num_cached, lacking = _there(images, [folder / view.name for view in views], set() if unknown else made)
    if unknown:
        num_cached, lacking = None, images.train
    unknown = unknown or (_NOT_SPLIT if num_cached is None else "")

    def computing() -> Callable[[Sequence[tuple[Path, str]]], object]:
        ready = engine(frozen, scratch / "encoders" / folder.name, num_threads=num_threads)
        return lambda some: rows_of(ready, some, frozen, views)

    kind: Literal["maps", "features"] = "maps" if frozen.num_blocks else "features"
    return _Rows(kind, shape, np.dtype(dtype).name, len(views), num, num_cached, unknown, lacking, computing)


_NOT_SPLIT = "which images train is known when they are validated and split"


def _there(images: Images, folders: Sequence[Path], made: set[Path]) -> tuple[int, int | None, Sequence[tuple[Path, str]]]:
    """How many rows are needed, how many of them are in the folders, one a view, and images of which one is not.

    What earlier phases have `made` is there; from now on, what this one makes is, too.
    """
    before = set(made)
    made.update(folders)
    if not images.split:
        num = images.num_train * len(folders) + images.num_valid
        return (num, num, ()) if before.issuperset(folders) else (num, None, images.train)
    train, valid = {digest for _, digest in images.train}, {digest for _, digest in images.valid}
    there = [train | valid if folder in before else names_in(folder) for folder in folders]
    num_cached = len(valid & there[0]) + sum(len(train & names) for names in there)
    everywhere = set.intersection(*there)
    lacking = [member for member in images.train if member[1] not in everywhere]
    lacking += [member for member in images.valid if member[1] not in there[0]]
    return len(train) * len(folders) + len(valid), num_cached, lacking


def _row_seconds(rows: _Rows) -> tuple[float | None, int]:
    """Seconds for a row that is not there, and of how many images that was measured; None without an image."""
    if not rows.lacking:
        return 0.0, 0
    every = max(1, len(rows.lacking) // _MOST_SAMPLED)
    sample = [member for member in rows.lacking[::every][:_MOST_SAMPLED] if member[1] or _decodes(member[0])]
    if not sample:
        return None, 0
    compute = rows.computing()
    compute(sample[:_FIRST])  # the first ones wait for what is loaded and compiled
    chosen = sample[:_FIRST]
    seconds = _seconds(compute, chosen)
    more = int(len(chosen) * _ENOUGH_S / seconds)
    if more > len(chosen) < len(sample):
        chosen = sample[:more]
        seconds = _seconds(compute, chosen)
    return seconds / len(chosen) / rows.num_views, len(chosen)


def _seconds(compute: Callable[[Sequence[tuple[Path, str]]], object], members: Sequence[tuple[Path, str]]) -> float:
    begun = time.perf_counter()
    compute(members)
    return time.perf_counter() - begun


def _decodes(path: Path) -> bool:
    try:
        decode(path.read_bytes())
    except UndecodableImage:
        return False
    return True


class _Enough(Exception):
    """Enough steps were timed."""


@dataclass
class _Timing(Hook):
    """Notes when each step ended, and ends the fit after enough of them."""

    ended_at: list[float] = field(default_factory=list)

    def on_step(self, fitting: Fitting) -> None:
        self.ended_at.append(time.perf_counter())
        if len(self.ended_at) > 2 and (self.ended_at[-1] - self.ended_at[0] > _ENOUGH_S or len(self.ended_at) > _MOST_STEPS):
            raise _Enough


@dataclass(frozen=True)
class _Again:
    """The same batch as often as it takes."""

    batch: torch.Tensor
    length: int

    def __len__(self) -> int:
        return self.length

    def take(self, rows: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        return self.batch[rows % len(self.batch)]


def _step_seconds(
    config: TrainingConfig,
    number: int,
    backbone: Backbone,
    model: ImageModel,
    part: nn.Module,
    images: Images,
    rows: _Rows,
    task: Task,
    scratch: Path,
) -> tuple[float | None, float | None, int]:
    """Seconds for a step and for the answer to an image, and how many steps were timed; the network stays as it is."""
    import torch

    phase = config.all_phases[number - 1]
    size = min(phase.fit.batch_size, max(2, images.num_train))
    phase = phase.model_copy(update={"fit": phase.fit.model_copy(update={"batch_size": size})})
    classes = task.classes(images.classes)
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, rows.dtype)
    batch = torch.rand(size, *rows.shape, generator=generator) * (255 if rows.dtype == "uint8" else 1)
    inputs = _Again(batch.to(dtype), size * (_MOST_STEPS + 2))
    labels = [images.classes[index % len(images.classes)] for index in range(len(inputs))]
    train = Examples(inputs, torch.from_numpy(task.targets(labels, classes)))
    valid = Examples(_Again(inputs.batch, size), train.targets[:size])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    out = scratch / f"steps-{number}"
    out.mkdir()
    timing = _Timing()
    try:
        fit_phase(
            phase,
            part,
            task,
            train,
            valid,
            len(classes),
            groups=parameter_groups(config, backbone, phase, part),
            checkpointing=Checkpointing(out, "", number),
            hooks=(timing,),
            setting=f"{config.place(number)}.fit",
            compute=resolve(config.compute),
        )
    except _Enough:
        pass
    except TrainingDiverged:
        return None, None, 0  # random numbers are not what its rate was chosen for
    finally:
        model.load_state_dict(before)
    timed = len(timing.ended_at) - 1
    predict(part, logits_of(phase), valid.inputs, size)
    begun = time.perf_counter()
    predict(part, logits_of(phase), valid.inputs, size)
    answered_s = time.perf_counter() - begun
    return (timing.ended_at[-1] - timing.ended_at[0]) / timed, answered_s / size, timed
