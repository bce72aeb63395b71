"""The winner of a search as a recipe: a file that names its study, and that no person's work is lost by."""

from __future__ import annotations

from pathlib import Path

import yaml

from components.contracts.errors import ConfigError
from components.contracts.records import sha256_text
from components.search import Tuned
from components.store import write_atomically
from flows.tuning.space import Space
from flows.tuning.study import Study, Trial
from flows.workspace.recipes import (
    SUFFIXES,
    RunConfig,
    expect_plain_name,
    parse,
    put,
    recipe_path,
    values_of,
)
from flows.workspace.yaml_reading import parse_yaml

_HEAD = "# Found by `visionloop tune`, which writes this file anew as long as nobody changes it. sha256 of what follows: "


def winner_name(config: RunConfig, asked: str) -> str:
    """What the winner's recipe is called."""
    return asked or f"{config.name}-tuned"


def expect_free(root: Path, name: str, study: str) -> None:
    """Raise ConfigError where the recipe cannot be written: a wrong name, or a file that is not this study's own."""
    expect_plain_name(name)
    if name.endswith(SUFFIXES):
        raise ConfigError(f"--write {name!r} ends like a file; give the recipe's name alone: {Path(name).stem!r}")
    path = _path(root, name)
    for other in (path.with_suffix(".yml"), path):
        if (other.exists() or other.is_symlink()) and not (other == path and _is_ours(path, study)):
            raise ConfigError(
                f"{other} is there already and is not what study {study!r} wrote into it, so it is left as it is; move it "
                f"away, or name another recipe for the winner: --write NAME"
            )


def write_winner(space: Space, study: Study, best: Trial, name: str) -> Path:
    """Write the recipe with the best trial's values; raises ConfigError where the file is not this study's."""
    recipe = space.recipe
    root = recipe.workspace.root
    expect_free(root, name, study.name)
    values = values_of(recipe_path(recipe.name, root), recipe.overrides)
    values.pop("search", None)
    for key, value in space.chosen(best.params).items():
        put(values, key, value, "the winner's recipe")
    tuned = Tuned(study=study.name, study_digest=study.digest(), trials=len(study.trials), trial=best.number)
    values |= {"name": name, "tuned": {key: value for key, value in tuned.to_json().items() if key != "schema_version"}}
    body = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    # What is written is what was trained: its checkpoint is found in the store.
    if parse(values, place="the winner's recipe").training != space.config(best.params).training:
        raise ConfigError(
            f"recipe {recipe.name!r} was changed while it was searched, so that the winner's would not be what was trained; "
            f"put it back as it was and run the same command again"
        )
    path = _path(root, name)
    path.parent.mkdir(exist_ok=True)
    text = f"{_HEAD}{sha256_text(body)}\n{body}"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text.encode())
    return path


def _path(root: Path, name: str) -> Path:
    return root / "recipes" / f"{name}.yaml"


def _is_ours(path: Path, study: str) -> bool:
    """Whether a file is as this study wrote it."""
    try:
        head, _, body = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return False
    if path.is_symlink() or head != f"{_HEAD}{sha256_text(body)}":
        return False
    values = parse_yaml(body, str(path))
    return isinstance(values, dict) and (values.get("tuned") or {}).get("study") == study
