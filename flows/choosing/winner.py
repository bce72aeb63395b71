"""The chosen variant as a recipe: the recipe that was chosen from with other values, which names the choice."""

from __future__ import annotations

from pathlib import Path

from components.contracts.errors import ConfigError
from components.variants import Choice, Chosen
from flows.choosing.expansion import Expansion
from flows.workspace.found_recipes import Writer
from flows.workspace.recipes import RunConfig, parse, put, recipe_path, values_of


def winner_name(config: RunConfig, asked: str) -> str:
    """What the winner's recipe is called."""
    return asked or f"{config.name}-chosen"


def expect_free(root: Path, name: str, recipe: str) -> None:
    """Raise ConfigError where the recipe cannot be written: a wrong name, or a file that is not this choice's own."""
    _writer(recipe).expect_free(root, name)


def write_winner(expansion: Expansion, choice: Choice, name: str) -> Path | None:
    """Write the chosen variant's recipe, None where none was chosen; raises ConfigError where the file is another's."""
    chosen = choice.of(choice.chosen)
    if chosen is None:
        return None
    recipe, root = expansion.recipe, expansion.recipe.workspace.root
    trunk = next(one for one in expansion.trunks if one.name == f"{chosen.backbone} / {chosen.passes}")
    target = next(one for one in trunk.targets if one.name == chosen.engine)
    values = values_of(recipe_path(recipe.name, root), recipe.overrides)
    for section in ("search", "choice"):
        values.pop(section, None)
    for key, value in expansion.with_engines(trunk.changed, [target]).items():
        put(values, key, value, "the chosen recipe")
    if not values.get("optimisation", True):
        del values["optimisation"]
    origin = Chosen(
        recipe=choice.recipe,
        variant=chosen.name,
        variants=sum(one.status == "measured" for one in choice.variants),
        choice_digest=choice.digest(),
    )
    values |= {"name": name, "chosen": {key: value for key, value in origin.to_json().items() if key != "schema_version"}}
    # What is written is what was computed: a run of it finds its checkpoint and its engine in the store.
    written = parse(values, place="the chosen recipe")
    if (written.training, written.optimisation.passes) != (trunk.config.training, trunk.config.optimisation.passes):
        raise ConfigError(
            f"recipe {recipe.name!r} was changed while its variants were compared, so that the chosen one would not be what "
            f"was measured; put it back as it was and run the same command again"
        )
    return _writer(choice.recipe).write(root, name, values)


def _writer(recipe: str) -> Writer:
    return Writer("choose", "chosen", "recipe", recipe, f"the choice of recipe {recipe!r}")
