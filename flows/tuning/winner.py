"""The winner of a search as a recipe: a file that names its study, and that no person's work is lost by."""

from __future__ import annotations

from pathlib import Path

from components.contracts.errors import ConfigError
from components.search import Tuned
from flows.tuning.space import Space
from flows.tuning.study import Study, Trial
from flows.workspace.found_recipes import Writer
from flows.workspace.recipes import RunConfig, parse, put, recipe_path, values_of


def winner_name(config: RunConfig, asked: str) -> str:
    """What the winner's recipe is called."""
    return asked or f"{config.name}-tuned"


def expect_free(root: Path, name: str, study: str) -> None:
    """Raise ConfigError where the recipe cannot be written: a wrong name, or a file that is not this study's own."""
    _writer(study).expect_free(root, name)


def write_winner(space: Space, study: Study, best: Trial, name: str) -> Path:
    """Write the recipe with the best trial's values; raises ConfigError where the file is not this study's."""
    recipe = space.recipe
    root = recipe.workspace.root
    values = values_of(recipe_path(recipe.name, root), recipe.overrides)
    values.pop("search", None)
    for key, value in space.chosen(best.params).items():
        put(values, key, value, "the winner's recipe")
    tuned = Tuned(study=study.name, study_digest=study.digest(), trials=len(study.trials), trial=best.number)
    values |= {"name": name, "tuned": {key: value for key, value in tuned.to_json().items() if key != "schema_version"}}
    # What is written is what was trained: its checkpoint is found in the store.
    if parse(values, place="the winner's recipe").training != space.config(best.params).training:
        raise ConfigError(
            f"recipe {recipe.name!r} was changed while it was searched, so that the winner's would not be what was trained; "
            f"put it back as it was and run the same command again"
        )
    return _writer(study.name).write(root, name, values)


def _writer(study: str) -> Writer:
    return Writer("tune", "tuned", "study", study, f"study {study!r}")
