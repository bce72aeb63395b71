"""Searches without a training: a worker that answers from a formula, and a study in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from shapes import SMOKE

from components.contracts.progress import Progress
from flows.terminal import Console
from flows.training.chosen import ChosenRecipe
from flows.tuning.searching import Asked, Search, _Going, identity
from flows.tuning.space import Space, Value, space_of
from flows.tuning.study import Study
from flows.tuning.trial import OnEpoch, TrialResult
from flows.workspace.recipes import RunConfig, load_recipe
from flows.workspace.settings import sqlite_url
from flows.workspace.workspace import Workspace

SPACE = """
search:
  trials: 14
  startup_trials: 3
  space:
    training.fit.learning_rate: {low: 0.0005, high: 0.05, log: true}
    training.backbone_settings.width: {choices: [4, 8, 16]}
    training.augmentation.rotate_degrees: {low: 0, high: 30}
"""


def recipe_of(root: Path, search: str = SPACE, *overrides: str) -> ChosenRecipe:
    """The smoke recipe with a section search, in a folder that is no workspace yet."""
    (root / "recipes").mkdir(parents=True, exist_ok=True)
    (root / "recipes" / "smoke.yaml").write_text(SMOKE + search)
    config = load_recipe("smoke", overrides, workspace=root)
    return ChosenRecipe(Workspace(root), "smoke", tuple(overrides), config)


Curve = Callable[[Mapping[str, Value], int], float]
"""The share of right answers of some values by an epoch."""


def score(params: Mapping[str, Value], epoch: int) -> float:
    """Best at a rate of 0.01 and a width of 8; rotation counts for little."""
    rate = float(params["training.fit.learning_rate"])
    distance = abs(rate - 0.01) * 10 + 0.1 * (params["training.backbone_settings.width"] != "8")
    turned = float(params["training.augmentation.rotate_degrees"]) / 3000
    return (0.95 - distance - turned) * (1 - 0.5**epoch)


class Formula:
    """A worker whose trials come to what a formula says."""

    def __init__(self, space: Space, curve: Curve = score, *, epochs: int = 4) -> None:
        self.space, self.curve, self.epochs = space, curve, epochs
        self.trained: list[int] = []

    def train(self, number: int, config: RunConfig, on_epoch: OnEpoch, progress: Progress) -> TrialResult:
        params = params_of(self.space, config)
        self.trained.append(number)
        rows: list[dict[str, float]] = []
        for epoch in range(1, self.epochs + 1):
            value = self.curve(params, epoch)
            rows.append({"epoch": epoch, "valid_accuracy": value, "valid_loss": 1 - value, "train_loss": 1 - value})
            if not on_epoch(rows[-1]):
                return TrialResult(state="pruned", history=tuple(rows))
        weights = str(sorted(params.items()))
        return TrialResult(state="complete", weights=weights, history=tuple(rows), valid={"accuracy": value})


def params_of(space: Space, config: RunConfig) -> dict[str, Value]:
    """The values that a trial's recipe has."""
    from components.search import spelled
    from flows.tuning.space import _plain, value_at

    found: dict[str, Value] = {}
    for one in space.parameters:
        value = _plain(value_at(config.to_json(), config, one.key))
        found[one.key] = spelled(value) if one.kind == "choice" else value
    return found


def searching(
    root: Path,
    recipe: ChosenRecipe,
    *,
    study: str = "s",
    url: str = "",
    patience_s: float = 0.2,
    lines: list[str] | None = None,
) -> Search:
    """A search on a study of its own, begun or taken up."""
    data: Any = SimpleNamespace(dvc_hash="d" * 32, digest=lambda: "d" * 64)
    held = lines if lines is not None else []
    console = Console(3, quiet=True)
    console.line = held.append  # type: ignore[method-assign, assignment]
    found = Study(url or sqlite_url(root / "studies.db"), study, say=held.append, patience_s=patience_s)
    space = space_of(recipe)
    found.begin(identity(space, data), "maximize")
    run: Any = SimpleNamespace(console=console, task=SimpleNamespace(headline="accuracy"), folder=root / "studies" / study)
    return Search(run, space, found, Asked(study))


def go(search: Search, *found: Any) -> None:
    """Let these workers train until nothing is left."""
    config = search.space.recipe.config.search
    assert config is not None
    _Going(search, config.trials, lambda *_: None).with_all(found)


def told(search: Search) -> list[tuple[Any, ...]]:
    """What a study holds, read anew."""
    study = Study(search.study.url, search.study.name)
    study.open()
    return [(one.number, one.params, one.state, one.value, one.curve) for one in study.trials]
