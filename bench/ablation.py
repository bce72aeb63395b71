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
from pathlib import Path
from typing import Any

import torch

from bench._trainings import NUM_THREADS, config_of, head_and_blocks, logits, parts_of, recipe_for
from bench.serving import say
from components.contracts.verdicts import Estimate
from components.intervals import Right, paired_difference, wilson
from components.phases import Phase

TRAINED, TESTED = 200, 400
"""Pictures of a class at most; of those that train, one in ten chooses the epoch. With few of them parts are told apart."""
SEEDS = 3
EPOCHS = 60
"""Of a phase at most."""
SHORT = {"TRAINED": 20, "TESTED": 10, "SEEDS": 2, "EPOCHS": 1}
_WHOLE = "head, blocks; two views, mixup"


def run(data: Path | None, scratch: Path) -> dict[str, Any]:
    """Accuracy of the whole recipe; the ratio is its accuracy to that of the best variant that lacks something."""
    torch.set_num_threads(NUM_THREADS)
    parts, classes = parts_of(data, scratch, trained=TRAINED, tested={"test": TESTED}, kept=lambda num: num // 4)
    recipe = recipe_for(parts["train"].paths)
    variants = _variants(*head_and_blocks(recipe))
    sizes = {name: len(part.labels) for name, part in parts.items()}
    say(f"{sizes} pictures of {len(classes)} classes, recipe {recipe}")
    test = parts["test"]
    right: dict[str, list[Right]] = {name: [] for name in variants}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for seed in range(SEEDS):
        for name, phases in variants.items():
            config = config_of(recipe, phases, seed=seed, epochs=EPOCHS)
            out = scratch / f"{seed} {name}"
            start = time.perf_counter()
            found = logits(config, parts["train"], parts["valid"], [test], len(classes), cache=scratch / "cache", out=out)
            answers: Right = found[0].argmax(axis=1) == test.labels
            seconds[name].append(time.perf_counter() - start)
            right[name].append(answers)
            say(f"  {name}, seed {seed}: {answers.mean():.4f} of {len(answers)}, {seconds[name][-1]:.0f} s")
    told = {name: _told(right[name], right[_WHOLE], seconds[name]) for name in variants}
    width = max(map(len, told))
    for name, figures in told.items():
        say(f"{name:{width}}  {figures['accuracy']:.4f}  {figures['against_the_whole'] or ''}")
    peers = {name: figures["accuracy"] for name, figures in told.items() if name != _WHOLE}
    return {
        "ours": told[_WHOLE]["accuracy"],
        "peers": peers,
        "ratio": round(told[_WHOLE]["accuracy"] / max(1e-9, *peers.values()), 4),
        "n": len(test.labels),
        "unit": f"share of right answers, mean of {SEEDS} seeds",
        "variants": told,
        "pictures": sizes,
        "recipe": recipe,
        "data": str(data) if data else "synthetic",
    }


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
