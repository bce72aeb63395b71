"""The recipe that a run was asked for: parsed once, and handed on to all that the run does.

A flow's parameters are strings, since a deployment keeps them on a server. Who starts a run in this process has parsed its
recipe before Prefect was imported, so that a typo costs no time; the flow takes that one up instead of reading it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from flows.workspace.recipes import RunConfig, load_recipe
from flows.workspace.workspace import Workspace


@dataclass(frozen=True)
class ChosenRecipe:
    """A recipe as a person or a deployment named it, in its workspace, and what it says."""

    workspace: Workspace
    name: str
    """A recipe's name, or the path of its file."""
    overrides: tuple[str, ...]
    config: RunConfig


_PARSED: ContextVar[ChosenRecipe | None] = ContextVar("parsed", default=None)


def choose(recipe: str, workspace: Workspace, overrides: Sequence[str] = ()) -> ChosenRecipe:
    """Parse a recipe with its overrides; raises ConfigError naming the key."""
    config = load_recipe(recipe, overrides, workspace=workspace.root)
    return ChosenRecipe(workspace, recipe, tuple(overrides), config)


@contextmanager
def handed_on(chosen: ChosenRecipe) -> Iterator[None]:
    """A flow that is called meanwhile, and names this recipe, takes it as it was parsed."""
    before = _PARSED.set(chosen)
    try:
        yield
    finally:
        _PARSED.reset(before)


def named(recipe: str, folder: Path, overrides: Sequence[str]) -> ChosenRecipe:
    """What the parameters of a flow name: as it was handed on, else parsed now. Raises ConfigError."""
    workspace, given = Workspace.find(folder), _PARSED.get()
    if given is not None and (given.workspace, given.name, given.overrides) == (workspace, recipe, tuple(overrides)):
        return given
    return choose(recipe, workspace, overrides)
