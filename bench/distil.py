"""A student at a fifth of its teacher's size: taught by the recipe `distil`, and trained as it is without a teacher.

The teacher is what the recipe of pictures of this size makes (`transfer`, or `cifar10` for small ones). Student and student
without a teacher are the same network, trained in the same phases on the same pictures by several seeds; they differ by
the teacher alone. All are asked about the same held-out pictures, which none of them has seen.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from bench._trainings import NUM_THREADS, answers_of, as_splits, config_of, parts_of, recipe_for
from components.checkpoints import restore
from components.contracts.records import Stored
from components.intervals import paired_difference, wilson
from components.training import TrainingConfig, train
from flows.workspace.recipes import load_recipe

SEEDS = 3
EPOCHS = 1000
"""At most: the recipes have fewer."""
TRAINED, TESTED = 5000, 2000
"""Pictures of a class, at most."""
SHORT = {"SEEDS": 1, "EPOCHS": 1, "TRAINED": 16, "TESTED": 8}
_KEPT = 0.4
"""Share of a folder without a test/ that is held out."""


def run(data: Path | None, scratch: Path) -> dict[str, Any]:
    """Points between teacher and student. Without `data`, noise: it shows that the benchmark runs, and measures nothing."""
    parts, classes = parts_of(
        data, scratch, trained=TRAINED, tested={"test": TESTED}, kept=lambda count: round(count * _KEPT)
    )
    recipe = recipe_for(parts["train"].paths[:200])
    splits, folder = as_splits(parts, classes, scratch / "splits")
    test, truth = parts["test"], np.array(parts["test"].labels)
    cache = scratch / "cache"

    def trained(name: str, config: TrainingConfig, teacher: Stored[Any] | None = None) -> Stored[Any]:
        print(f"{name} ...", file=sys.stderr)
        out = scratch / name
        out.mkdir()
        made = train(
            splits,
            folder,
            config,
            out=out,
            cache=cache,
            root=scratch,
            num_threads=NUM_THREADS,
            teacher=teacher,
        )
        return Stored(made, out)

    def right(checkpoint: Stored[Any]) -> Any:
        return answers_of(checkpoint, test, cache=cache).argmax(axis=1) == truth

    teacher = trained("teacher", config_of(recipe, load_recipe(recipe).training.all_phases, seed=0, epochs=EPOCHS))
    of_teacher, rows = right(teacher), []
    for seed in range(SEEDS):
        student = _student(recipe, seed)
        assert student.teacher is not None
        told = student.teacher.model_copy(update={"champion": "", "checkpoint": "teacher"})
        taught = trained(f"student-{seed}", student.model_copy(update={"teacher": told}), teacher)
        alone = trained(f"alone-{seed}", student.model_copy(update={"teacher": None}))
        rows.append((taught, right(taught), right(alone)))
    gaps = [paired_difference(of_teacher, of_student) for _, of_student, _ in rows]
    gains = [float(of_student.mean() - of_alone.mean()) for _, of_student, of_alone in rows]
    sizes = {name: _size(checkpoint) for name, checkpoint in (("teacher", teacher), ("student", rows[0][0]))}
    return {
        "ours": round(float(np.mean([gap.value for gap in gaps])) * 100, 2),
        "peers": {
            "without a teacher": round(float(np.mean([of_teacher.mean() - alone.mean() for *_, alone in rows])) * 100, 2)
        },
        "ratio": round(sizes["student"]["parameters"] / sizes["teacher"]["parameters"], 3),
        "n": len(truth),
        "unit": f"points of accuracy below the teacher, mean of {SEEDS} seeds; the ratio is of the parameters",
        "teacher": _told(wilson(int(of_teacher.sum()), len(truth))),
        "students": [_told(wilson(int(found.sum()), len(truth))) for _, found, _ in rows],
        "points_below": [_told(gap) for gap in gaps],
        "points_gained_by_teacher": [round(gain * 100, 2) for gain in gains],
        "sizes": sizes,
        "recipe": recipe,
        "data": str(data) if data else "noise",
    }


def _student(recipe: str, seed: int) -> TrainingConfig:
    """The training of `distil`, on pictures as the teacher's recipe prepares them."""
    config = config_of("distil", load_recipe("distil").training.all_phases, seed=seed, epochs=EPOCHS)
    teachers = load_recipe(recipe).training.backbone_settings
    return config.model_copy(update={"backbone_settings": {**teachers, **config.backbone_settings}})


def _size(checkpoint: Stored[Any]) -> dict[str, int]:
    model = restore(checkpoint)
    return {"parameters": sum(each.numel() for each in model.parameters()), "bytes": checkpoint.record.weights.bytes}


def _told(found: Any) -> dict[str, float]:
    return {"value": round(found.value, 4), "low": round(found.low, 4), "high": round(found.high, 4)}
