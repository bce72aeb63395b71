"""A recipe of a workspace's own, made from one that there is."""

from __future__ import annotations

from pathlib import Path

from components.contracts.errors import ConfigError, UnknownName
from components.contracts.records import Record
from flows.workspace.recipes import SUFFIXES, expect_plain_name, load_recipe, recipe_files
from flows.workspace.yaml_reading import with_values


class NewRecipe(Record):
    """What was written."""

    recipe: str
    model: str
    file: str
    """Within the workspace."""
    copied_from: str
    """Name of the recipe that it is a copy of."""


def new_recipe(workspace: Path, name: str, source: str) -> NewRecipe:
    """Write `recipes/NAME.yaml` of a workspace: the recipe `source`, comments kept, for a model of the new name.

    Raises ConfigError for a name that cannot be one, a file that is there, and a source that is unknown or cannot be used.
    """
    expect_plain_name(name)
    if name.endswith(SUFFIXES):
        raise ConfigError(f"{name!r} ends like a file; give the recipe's name alone: {Path(name).stem!r}")
    files = recipe_files(workspace)
    if source not in files:
        raise UnknownName("recipe", source, list(files))
    path = workspace / "recipes" / f"{name}.yaml"
    for taken in (path, path.with_suffix(".yml")):
        if taken.exists() or taken.is_symlink():
            raise ConfigError(f"{taken} is there already and is left as it is; choose another name, or move it away")
    load_recipe(source, workspace=workspace)
    text = with_values(files[source], {"name": name, "model": name}, "recipe")
    path.parent.mkdir(exist_ok=True)
    with path.open("x", encoding="utf-8", newline="") as file:
        file.write(text)
    return NewRecipe(recipe=name, model=name, file=path.relative_to(workspace).as_posix(), copied_from=source)
