"""How a model is watched and retrained: `loops/<model>.yaml` of the workspace, or the defaults."""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, ValidationError, field_validator

from components.contracts.errors import ConfigError, UnknownName
from components.contracts.records import Record, first_problem
from flows.loop.window_store import WindowStore, open_windows
from flows.workspace.recipes import load_recipe, peek, recipe_files
from flows.workspace.settings import Settings
from flows.workspace.workspace import Workspace
from flows.workspace.yaml_reading import read_mapping
from monitoring.drift import DriftPolicy, check
from monitoring.governor import GovernorPolicy
from monitoring.records import open_records

if TYPE_CHECKING:
    from registry.ledger import Ledger

LOOPS = "loops"


class LoopConfig(Record):
    """One model's loop, completely."""

    recipe: str | None = None
    """What it is retrained with; none where one recipe alone makes the model."""
    every_minutes: int = Field(default=15, ge=1, le=24 * 60)
    """Length of a window, and how often one is looked at."""
    look_back: int = Field(default=8, ge=1, le=200)
    """Windows that are looked at again when rows of theirs came late, or when nobody looked."""
    nightly: str | None = "0 3 * * *"
    """Cron of the scheduled retraining; none for no schedule."""
    timezone: str = "UTC"
    to_label: int = Field(default=50, ge=1, le=10_000)
    """Images that are proposed for labelling when a window alarms."""
    keep_days: float = Field(default=90.0, gt=0)
    """How long windows and their reports stay; alarms, decisions and labels stay for good."""
    sweep_after_s: float = Field(default=60.0, ge=0)
    """An alarm that nobody acted on for so long is started without its event."""
    drift: DriftPolicy = DriftPolicy()
    governor: GovernorPolicy = GovernorPolicy()

    @field_validator("nightly")
    @classmethod
    def _cron(cls, value: str | None) -> str | None:
        if value is not None and len(value.split()) != 5:
            raise ValueError(f"{value!r} is no cron line of five fields, such as '0 3 * * *'")
        return value


def load_loop(workspace: Workspace, model: str) -> LoopConfig:
    """How the model is looped, by its file or the defaults; raises ConfigError naming the key."""
    path = workspace.root / LOOPS / f"{model}.yaml"
    values = read_mapping(path, "loop", may_be_empty=True) if os.path.lexists(path) else {}
    try:
        config = LoopConfig.model_validate_json(json.dumps(values), strict=True)
    except (ValidationError, TypeError) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else str(error)
        valid = ", ".join(name for name in LoopConfig.model_fields if name != "schema_version")
        raise ConfigError(f"{path}: {problem}; keys are {valid}") from error
    try:
        check(config.drift)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config


def training_recipe(workspace: Workspace, model: str, config: LoopConfig) -> str:
    """What the model is retrained with: the recipe that its loop names, else the one that makes it.

    Raises ConfigError when it does not make this model, or when none or several do and none is named.
    """
    path = workspace.root / LOOPS / f"{model}.yaml"
    recipe = config.recipe or _only_recipe(workspace, model, path)
    try:
        found = load_recipe(recipe, workspace=workspace.root)
    except UnknownName as error:
        if config.recipe is None:
            raise
        raise ConfigError(f"{path}: {error}") from error
    if found.model != model:
        raise ConfigError(f"{path}: recipe {recipe!r} makes model {found.model!r}, not {model!r}")
    return recipe


def _only_recipe(workspace: Workspace, model: str, path: Path) -> str:
    found, unread = [], []
    for name, file in recipe_files(workspace.root).items():
        try:
            if peek(file).model == model:
                found.append(name)
        except ConfigError as error:
            unread.append(str(error))
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(
            f"recipes {' and '.join(sorted(found))} all make model {model!r}, and the loop has to know which one to train: "
            f"write the line `recipe: {min(found)}` (or another of them) into {path}"
        )
    broken = f" (not read: {'; '.join(unread)})" if unread else ""
    raise ConfigError(
        f"no recipe makes model {model!r}{broken}; write one with `model: {model}` into {workspace.root / 'recipes'}"
    )


def configured(workspace: Workspace) -> list[str]:
    """Models that have a loop file."""
    return sorted(path.stem for path in (workspace.root / LOOPS).glob("*.yaml"))


class Loop:
    """One model's loop in a workspace: its tables, and its configuration once that is asked for.

    What a person reads or decides needs neither a valid configuration nor a recipe.
    """

    def __init__(self, workspace: Workspace, settings: Settings, model: str, *, ledger: Ledger | None = None) -> None:
        """With a `ledger` that is open already, such as one that a long-running process follows, that one is asked."""
        from monitoring.governor import Governor
        from monitoring.labels import Labels
        from monitoring.outbox import Outbox

        self.workspace, self.settings, self.model = workspace, settings, model
        database = open_records(settings.loop_url)
        self.outbox = Outbox(database)
        self.governor = Governor(database, lambda: self.config.governor)
        self.labels = Labels(database)
        self._ledger = ledger

    @cached_property
    def ledger(self) -> Ledger:
        """Where the model's versions are decided."""
        from registry.ledger import Ledger

        return self._ledger or Ledger(self.settings.ledger_url)

    @cached_property
    def config(self) -> LoopConfig:
        """How it is looped; raises ConfigError."""
        return load_loop(self.workspace, self.model)

    @cached_property
    def recipe(self) -> str:
        """What it is retrained with; raises ConfigError."""
        return training_recipe(self.workspace, self.model, self.config)

    @property
    def window_store(self) -> WindowStore:
        """Where the evidence of the model's windows lies."""
        return open_windows(self.settings.windows_url, self.model)
