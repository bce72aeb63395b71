"""What benchmarks that train share: pictures in parts, the recipe for pictures of their size, its phases on cached maps."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from bench.frozen_training import images_of
from components import plugins
from components.checkpoints import restore
from components.contracts.data import SPLITS, DataVersion, Splits
from components.contracts.families import Backbone
from components.contracts.models import Checkpoint
from components.contracts.records import Stored
from components.features import Frozen, maps
from components.fitting import Examples, predict
from components.hooks import Checkpointing
from components.images import decode, pixel_digest
from components.phases import Phase
from components.pictures import prepared
from components.store import describe
from components.training import TrainingConfig, fit_phase, initial, logits_of, parameter_groups, part_of
from flows.workspace.recipes import load_recipe

NUM_THREADS = 2
_PHOTOGRAPH = 128
"""Pixels of the shorter side from which a picture is one."""


@dataclass(frozen=True)
class Part:
    """Pictures with the numbers of their classes."""

    pictures: list[str]
    paths: list[Path]
    labels: list[int]


def parts_of(
    data: Path | None, scratch: Path, *, trained: int, tested: Mapping[str, int], kept: Callable[[int], int]
) -> tuple[dict[str, Part], tuple[str, ...]]:
    """Pictures to train on (`train`), to choose the epoch by (`valid`) and for each part of `tested`, and their classes.

    Of a class so many at most; one in ten of those that train is valid. No picture is in two parts, by its pixels. A folder
    of class folders keeps `kept(pictures of the class)` for `tested`, one of train/ and test/ what is in test/; without
    `data` the pictures are noise of two kinds.
    """
    if data is None:
        paths, numbers = images_of(None, scratch, 2 * (trained + sum(tested.values())))
        sides = [[(path, f"kind {number}") for path, number in zip(paths, numbers, strict=True)]]
    else:
        folders = [data / "train", data / "test"]
        folders = folders if all(folder.is_dir() for folder in folders) else [data]
        sides = [[(path, path.parent.name) for path in sorted(folder.glob("*/*"))] for folder in folders]
    classes = tuple(sorted({label for _, label in sides[0]}))
    rng = np.random.default_rng(0)
    seen: set[str] = set()
    chosen: dict[str, list[tuple[str, Path, int]]] = {name: [] for name in ("train", "valid", *tested)}
    for number, label in enumerate(classes):
        of_class = [[path for path, given in side if given == label] for side in sides]
        mixed = [[paths[place] for place in rng.permutation(len(paths))] for paths in of_class]
        first = kept(len(mixed[0]))
        training, testing = mixed if len(mixed) == 2 else (mixed[0][first:], mixed[0][:first])
        training, tenth = training[:trained], max(1, len(training[:trained]) // 10)
        taken: dict[str, list[Path]] = {}
        for name, most in tested.items():
            taken[name], testing = testing[:most], testing[most:]
        for name, paths in {**taken, "valid": training[:tenth], "train": training[tenth:]}.items():
            for path in paths:
                picture = pixel_digest(decode(path.read_bytes()))[:32]
                if picture not in seen:
                    seen.add(picture)
                    chosen[name].append((picture, path, number))
    if lacking := [name for name, rows in chosen.items() if not rows]:
        raise SystemExit(f"{data or 'the noise'} has no pictures left for {', '.join(lacking)}; expected more of each class")
    return {name: Part(*map(list, zip(*rows, strict=True))) for name, rows in chosen.items()}, classes


def as_splits(parts: Mapping[str, Part], classes: Sequence[str], folder: Path) -> tuple[Stored[Splits], Path]:
    """Parts as the splits of a training, in the empty `folder`, and the folder that their paths are relative to."""
    import pandas as pd

    data = Path(os.path.commonpath([path.parent for part in parts.values() for path in part.paths]))
    table = pd.DataFrame(
        [
            (os.path.relpath(path, data), classes[label], picture, picture, name)
            for name, part in parts.items()
            for picture, path, label in zip(part.pictures, part.paths, part.labels, strict=True)
        ],
        columns=["path", "label", "sha256", "picture", "split"],
    )
    folder.mkdir(parents=True)
    table.to_parquet(folder / "splits.parquet", index=False)
    record = Splits(
        data=DataVersion(dvc_hash="bench", num_files=len(table), bytes=1, ledger_sha256="bench"),
        table=describe(folder / "splits.parquet", within=folder),
        classes=tuple(classes),
        counts={name: len(parts[name].labels) if name in parts else 0 for name in SPLITS},
        class_counts={},
        num_duplicate_groups=0,
        test_digest="bench",
    )
    return Stored(record, folder), data


def answers_of(checkpoint: Stored[Checkpoint], asked: Part, *, cache: Path) -> npt.NDArray[np.float32]:
    """What a trained network says about the pictures of a part, (n, num_classes)."""
    model = restore(checkpoint)
    inputs = prepared(asked.pictures, asked.paths, checkpoint.record.preprocessing, cache=cache)
    with torch.inference_mode():
        rows = torch.split(torch.arange(len(inputs)), 64)
        return np.concatenate([model(inputs.take(some, None))[0].numpy() for some in rows])


def recipe_for(paths: Sequence[Path]) -> str:
    """The name of the recipe for pictures of this size."""
    sides = []
    for path in paths:
        with Image.open(path) as picture:
            sides.append(min(picture.size))
    return "transfer" if statistics.median(sides) >= _PHOTOGRAPH else "cifar10"


def head_and_blocks(recipe: str) -> tuple[Phase, Phase]:
    """The phases of the whole recipe: the head phase of `transfer`, and the last phase of this one."""
    return load_recipe("transfer").training.all_phases[0], load_recipe(recipe).training.all_phases[-1]


def config_of(recipe: str, phases: Sequence[Phase], *, seed: int, epochs: int) -> TrainingConfig:
    """The training of a recipe with these phases, of so many epochs each at most."""
    seeded = []
    for phase in phases:
        fit = phase.fit.model_copy(update={"seed": seed, "epochs": min(epochs, phase.fit.epochs)})
        seeded.append(phase.model_copy(update={"fit": fit}))
    return load_recipe(recipe).training.model_copy(update={"phases": tuple(seeded)})


def logits(
    config: TrainingConfig,
    train: Part,
    valid: Part,
    asked: Sequence[Part],
    num_classes: int,
    *,
    cache: Path,
    out: Path,
) -> list[npt.NDArray[np.float32]]:
    """What the network says after these phases about the pictures of each part that it is asked about, (n, num_classes)."""
    backbone: Backbone = plugins.load("backbones", config.backbone, dict(config.backbone_settings))
    task = plugins.load("tasks", config.task, dict(config.task_settings))
    model, _ = initial(config, tuple(map(str, range(num_classes))), cache=cache, root=out)
    out.mkdir(parents=True)
    for number, phase in enumerate(config.phases, 1):
        part, num_blocks = part_of(config, backbone, phase, model)
        frozen = Frozen(config.backbone, backbone, model.backbone.state_dict(), num_blocks)
        views = phase.cached_views()
        examples = [
            Examples(
                maps(
                    side.pictures,
                    side.paths,
                    frozen,
                    views if side is train else views[:1],
                    cache=cache,
                    num_threads=NUM_THREADS,
                ),
                torch.tensor(side.labels),
            )
            for side in (train, valid, *(asked if number == len(config.phases) else ()))
        ]
        fit_phase(
            phase,
            part,
            task,
            examples[0],
            examples[1],
            num_classes,
            groups=parameter_groups(config, backbone, phase, part),
            checkpointing=Checkpointing(out, "bench", number),
            hooks=(),
            setting=f"{config.place(number)}.fit",
        )
    found = [predict(part, logits_of(phase), side.inputs, phase.fit.batch_size) for side in examples[2:]]
    return [answer.numpy().astype(np.float32) for answer in found]
