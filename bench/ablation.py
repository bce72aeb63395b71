"""What each part of a recipe buys in accuracy: the head, the last blocks above it, a second view, MixUp, a head first.

The variants are those of the recipe `transfer` where DATA is photographs, and of `cifar10`, behind the head phase of
`transfer`, where most pictures are smaller than 128 pixels. All of them train on the same pictures, once with each seed, and
answer the same test pictures, so that each is compared with the whole recipe picture by picture. DATA is a folder of class
folders, a quarter of which is test, or of train/ and test/ with class folders in them; without it the pictures are noise of
two kinds, and accuracy means nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.frozen_training import images_of
from bench.serving import say
from components import plugins
from components.contracts.families import Backbone
from components.contracts.verdicts import Estimate
from components.features import Frozen, maps
from components.fitting import Examples, predict
from components.hooks import Checkpointing
from components.images import decode, pixel_digest
from components.intervals import Right, paired_difference, wilson
from components.phases import Phase
from components.training import TrainingConfig, fit_phase, initial, logits_of, parameter_groups, part_of
from flows.workspace.recipes import load_recipe

TRAINED, TESTED = 200, 400
"""Pictures of a class at most; of those that train, one in ten chooses the epoch. With few of them parts are told apart."""
SEEDS = 3
EPOCHS = 60
"""Of a phase at most."""
SHORT = {"TRAINED": 20, "TESTED": 10, "SEEDS": 2, "EPOCHS": 1}
_NUM_THREADS = 2
_PHOTOGRAPH = 128
"""Pixels of the shorter side from which a picture is one."""
_WHOLE = "head, blocks; two views, mixup"


@dataclass(frozen=True)
class _Part:
    """Pictures with the numbers of their classes."""

    pictures: list[str]
    paths: list[Path]
    labels: list[int]


def run(data: Path | None, scratch: Path) -> dict[str, Any]:
    """Accuracy of the whole recipe; the ratio is its accuracy to that of the best variant that lacks something."""
    torch.set_num_threads(_NUM_THREADS)
    parts, num_classes = _parts(data, scratch)
    recipe = _recipe(parts[0].paths)
    head = _section("transfer").all_phases[0]
    variants = _variants(head, _section(recipe).all_phases[-1])
    sizes = " + ".join(str(len(part.labels)) for part in parts)
    say(f"{sizes} pictures (train, valid, test) of {num_classes} classes, recipe {recipe}")
    right: dict[str, list[Right]] = {name: [] for name in variants}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for seed in range(SEEDS):
        for name, phases in variants.items():
            seeded = [_within(phase, seed) for phase in phases]
            config = _section(recipe).model_copy(update={"phases": tuple(seeded)})
            start = time.perf_counter()
            answers = _trained(config, parts, num_classes, scratch / "cache", scratch / f"{seed} {name}")
            seconds[name].append(time.perf_counter() - start)
            right[name].append(answers)
            say(f"  {name}, seed {seed}: {answers.mean():.4f} of {len(answers)}, {seconds[name][-1]:.0f} s")
    found = {name: _told(right[name], right[_WHOLE], seconds[name]) for name in variants}
    width = max(map(len, found))
    for name, told in found.items():
        say(f"{name:{width}}  {told['accuracy']:.4f}  {told['against_the_whole'] or ''}")
    peers = {name: told["accuracy"] for name, told in found.items() if name != _WHOLE}
    return {
        "ours": found[_WHOLE]["accuracy"],
        "peers": peers,
        "ratio": round(found[_WHOLE]["accuracy"] / max(1e-9, *peers.values()), 4),
        "n": len(parts[2].labels),
        "unit": f"share of right answers, mean of {SEEDS} seeds",
        "variants": found,
        "pictures": dict(zip(("train", "valid", "test"), (len(part.labels) for part in parts), strict=True)),
        "recipe": recipe,
        "data": str(data) if data else "synthetic",
    }


def _parts(data: Path | None, scratch: Path) -> tuple[tuple[_Part, _Part, _Part], int]:
    """Pictures to train on, to choose the epoch by and to answer; none is in two of them, by its pixels."""
    if data is None:
        paths, numbers = images_of(None, scratch, 2 * (TRAINED + TESTED))
        sides = [[(path, f"kind {number}") for path, number in zip(paths, numbers, strict=True)]]
    else:
        folders = [data / "train", data / "test"]
        folders = folders if all(folder.is_dir() for folder in folders) else [data]
        sides = [[(path, path.parent.name) for path in sorted(folder.glob("*/*"))] for folder in folders]
    classes = sorted({label for _, label in sides[0]})
    rng = np.random.default_rng(0)
    seen: set[str] = set()
    chosen: dict[str, list[tuple[str, Path, int]]] = {"train": [], "valid": [], "test": []}
    for number, label in enumerate(classes):
        of_class = [[path for path, given in side if given == label] for side in sides]
        mixed = [[paths[place] for place in rng.permutation(len(paths))] for paths in of_class]
        quarter = len(mixed[0]) // 4
        trained, tested = mixed if len(mixed) == 2 else (mixed[0][quarter:], mixed[0][:quarter])
        trained, tested = trained[:TRAINED], tested[:TESTED]
        tenth = max(1, len(trained) // 10)
        for part, paths in {"test": tested, "valid": trained[:tenth], "train": trained[tenth:]}.items():
            for path in paths:
                picture = pixel_digest(decode(path.read_bytes()))[:32]
                if picture not in seen:
                    seen.add(picture)
                    chosen[part].append((picture, path, number))
    made = [_Part(*map(list, zip(*rows, strict=True))) for rows in chosen.values()]
    return (made[0], made[1], made[2]), len(classes)


def _recipe(paths: Sequence[Path]) -> str:
    """The name of the recipe for pictures of this size."""
    sides = []
    for path in paths:
        with Image.open(path) as picture:
            sides.append(min(picture.size))
    return "transfer" if statistics.median(sides) >= _PHOTOGRAPH else "cifar10"


def _section(recipe: str) -> TrainingConfig:
    return load_recipe(recipe).training


def _variants(head: Phase, blocks: Phase) -> dict[str, list[Phase]]:
    """The phases of each variant, by its name."""
    mixing = tuple(one for one in blocks.augmentations if one.load().mixes)
    changing = tuple(one for one in blocks.augmentations if not one.load().mixes)
    plain = blocks.model_copy(update={"views": 1, "augmentations": ()})
    return {
        "head alone": [head],
        "head, blocks; one view": [head, plain],
        "head, blocks; one view, mixup": [head, plain.model_copy(update={"augmentations": mixing})],
        "head, blocks; two views": [head, blocks.model_copy(update={"augmentations": changing})],
        _WHOLE: [head, blocks],
        "blocks at once; two views, mixup": [blocks],
    }


def _within(phase: Phase, seed: int) -> Phase:
    fit = phase.fit.model_copy(update={"seed": seed, "epochs": min(EPOCHS, phase.fit.epochs)})
    return phase.model_copy(update={"fit": fit})


def _trained(config: TrainingConfig, parts: tuple[_Part, _Part, _Part], num_classes: int, cache: Path, out: Path) -> Right:
    """Which of the test pictures the network answers right after these phases."""
    backbone: Backbone = plugins.load("backbones", config.backbone, dict(config.backbone_settings))
    task = plugins.load("tasks", config.task, dict(config.task_settings))
    model, _ = initial(config, tuple(map(str, range(num_classes))), cache=cache, root=out)
    out.mkdir(parents=True)
    for number, phase in enumerate(config.phases, 1):
        part, num_blocks = part_of(config, backbone, phase, model)
        frozen = Frozen(config.backbone, backbone, model.backbone.state_dict(), num_blocks)
        train, valid, test = (
            Examples(
                maps(
                    side.pictures,
                    side.paths,
                    frozen,
                    phase.cached_views()[: None if side is parts[0] else 1],
                    cache=cache,
                    num_threads=_NUM_THREADS,
                ),
                torch.tensor(side.labels),
            )
            for side in parts
        )
        fit_phase(
            phase,
            part,
            task,
            train,
            valid,
            num_classes,
            groups=parameter_groups(config, backbone, phase, part),
            checkpointing=Checkpointing(out, "bench", number),
            hooks=(),
            setting=f"{config.place(number)}.fit",
        )
    logits = predict(part, logits_of(phase), test.inputs, phase.fit.batch_size)
    right: Right = (logits.argmax(dim=1) == test.targets).numpy()
    return right


def _told(right: list[Right], whole: list[Right], seconds: list[float]) -> dict[str, Any]:
    """Mean accuracy over the seeds, each one's with its interval, and how far it lies above the whole recipe's."""
    shares = [float(answers.mean()) for answers in right]
    return {
        "accuracy": round(statistics.mean(shares), 4),
        "n": len(right[0]),
        "of_seeds": [str(wilson(int(answers.sum()), len(answers))) for answers in right],
        "against_the_whole": str(_above(right, whole)) if right is not whole else None,
        "seconds": round(statistics.mean(seconds), 1),
    }


def _above(right: list[Right], whole: list[Right]) -> Estimate:
    """Mean over the seeds of the paired difference and of its limits.

    A mean varies at most as much as its members do on average, so that the interval is rather too wide; and unlike that of
    pictures drawn anew it has a width where few or no answers differ.
    """
    found = [paired_difference(one, other) for one, other in zip(right, whole, strict=True)]
    value, low, high = (statistics.mean(getattr(each, name) for each in found) for name in ("value", "low", "high"))
    return Estimate(value=value, low=low, high=high, n=found[0].n, method=found[0].method)
