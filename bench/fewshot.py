"""The recipe `fewshot` on draws of a few pictures of each class, judged on the same held-out pictures.

Each draw is a training by the recipe, of so many pictures of each class and of no others: none is valid. The mean over draws
has Student's interval, which is about other draws of so few pictures; each draw's accuracy is of the same test pictures.
Beside it stand what scikit-learn makes of the same embeddings of the same pictures: nearest centroids, and logistic
regression with its default strength.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bench._trainings import NUM_THREADS, Part, as_splits, parts_of, recipe_for
from components import plugins
from components.checkpoints import restore
from components.contracts.records import Stored
from components.features import embed
from components.intervals import wilson
from components.training import TrainingConfig, train
from flows.workspace.recipes import load_recipe

PICTURES = (1, 2, 5, 10, 20)
"""Of each class that train."""
JUDGED = 10
"""The number that the floor is about."""
DRAWS = 10
TRAINED, TESTED = 5000, 500
"""Pictures of a class to draw from and to test on, at most."""
SHORT = {"PICTURES": (1, 4), "JUDGED": 4, "DRAWS": 2, "TRAINED": 16, "TESTED": 8}
_KEPT = 0.4
"""Share of a folder without a test/ that is held out."""
Floats = npt.NDArray[np.float32]


def run(data: Path | None, scratch: Path) -> dict[str, Any]:
    """Mean accuracy over draws. Without `data`, noise: it shows that the benchmark runs, and measures nothing."""
    parts, classes = parts_of(
        data, scratch, trained=TRAINED, tested={"test": TESTED}, kept=lambda count: round(count * _KEPT)
    )
    config = _training(recipe_for(parts["train"].paths[:200]))
    test, truth = parts["test"], np.array(parts["test"].labels)
    train_part, valid = parts["train"], parts["valid"]
    pool = Part(train_part.pictures + valid.pictures, train_part.paths + valid.paths, train_part.labels + valid.labels)
    seen = _embedded(config, test, scratch)
    found: dict[str, dict[str, list[float]]] = {}
    for number in PICTURES:
        rows = found.setdefault(str(number), {"ours": [], "nearest centroids": [], "logistic regression": []})
        for draw in range(DRAWS):
            chosen = _drawn(pool, number, draw)
            out = scratch / f"{number}-{draw}"
            head = _head(config, chosen, test, classes, out, scratch).head
            with torch.inference_mode():
                answers = head(torch.from_numpy(seen)).argmax(dim=1).numpy()
            rows["ours"].append(float((answers == truth).mean()))
            for name, answers in _peers(_embedded(config, chosen, scratch), chosen.labels, seen).items():
                rows[name].append(float((answers == truth).mean()))
        print(number, {name: _mean(each)["value"] for name, each in rows.items()}, file=sys.stderr)
    means = {number: {name: _mean(each) for name, each in rows.items()} for number, rows in found.items()}
    judged = means[str(JUDGED)]
    return {
        "ours": judged["ours"]["value"],
        "peers": {name: each["value"] for name, each in judged.items() if name != "ours"},
        "ratio": None,
        "n": len(truth),
        "unit": f"accuracy with {JUDGED} pictures of each class, mean of {DRAWS} draws",
        "low": judged["ours"]["low"],
        "high": judged["ours"]["high"],
        "of_a_draw": _interval(found[str(JUDGED)]["ours"][0], len(truth)),
        "pictures": means,
        "data": str(data) if data else "noise",
    }


def _training(recipe: str) -> TrainingConfig:
    """That of `fewshot`, on pictures as the recipe for pictures of this size prepares them."""
    config = load_recipe("fewshot").training
    return config.model_copy(update={"backbone_settings": load_recipe(recipe).training.backbone_settings})


def _drawn(pool: Part, number: int, draw: int) -> Part:
    """So many pictures of each class."""
    rng, labels = np.random.default_rng([draw, number]), np.array(pool.labels)
    rows = [row for label in np.unique(labels) for row in rng.choice(np.flatnonzero(labels == label), number, replace=False)]
    return Part([pool.pictures[row] for row in rows], [pool.paths[row] for row in rows], [pool.labels[row] for row in rows])


def _head(config: TrainingConfig, chosen: Part, test: Part, classes: tuple[str, ...], out: Path, scratch: Path) -> Any:
    splits, folder = as_splits({"train": chosen, "test": test}, classes, out / "splits")
    record = train(splits, folder, config, out=out, cache=scratch / "cache", root=scratch, num_threads=NUM_THREADS)
    return restore(Stored(record, out))


def _embedded(config: TrainingConfig, part: Part, scratch: Path) -> Floats:
    backbone = plugins.load("backbones", config.backbone, dict(config.backbone_settings))
    state = backbone.pretrained(config.weights, cache=scratch)
    cache = scratch / "cache"
    found: Floats = embed(part.pictures, part.paths, config.backbone, backbone, state, cache=cache, num_threads=NUM_THREADS)
    return found


def _peers(known: Floats, labels: list[int], asked: Floats) -> dict[str, npt.NDArray[Any]]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import NearestCentroid

    peers = {"nearest centroids": NearestCentroid(), "logistic regression": LogisticRegression(max_iter=1000)}
    return {name: peer.fit(known, labels).predict(asked) for name, peer in peers.items()}


def _mean(values: list[float]) -> dict[str, float]:
    """The mean with Student's 95 % interval."""
    from scipy.stats import t

    mean, num = float(np.mean(values)), len(values)
    half = float(t.ppf(0.975, num - 1) * np.std(values, ddof=1) / math.sqrt(num)) if num > 1 else math.nan
    told = {"value": mean, "low": mean - half, "high": mean + half, "worst": min(values)}
    return {name: round(value, 4) for name, value in told.items()}


def _interval(share: float, n: int) -> list[float]:
    found = wilson(round(share * n), n)
    return [round(found.low, 4), round(found.high, 4)]
