"""How a model is watched and retrained: `loops/<model>.yaml` of the workspace, or the defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator

from components.contracts import ConfigError, Record, first_problem
from flows.config import load_recipe, recipe_files
from flows.run import Workspace
from flows.settings import Settings
from monitoring.drift import DriftPolicy, check
from monitoring.governor import GovernorPolicy
from monitoring.records import open_records

LOOPS = "loops"


class LoopConfig(Record):
    """One model's loop, completely."""

    recipe: str
    """What it is retrained with."""
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
    """The model's loop; raises ConfigError naming the key, or when no recipe makes the model."""
    path = workspace.root / LOOPS / f"{model}.yaml"
    values: dict[str, Any] = {}
    if path.is_file():
        try:
            values = yaml.safe_load(path.read_text()) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} is not a mapping")
    values.setdefault("recipe", _recipe_of(workspace, model))
    try:
        config = LoopConfig.model_validate_json(json.dumps(values), strict=True)
    except (ValidationError, TypeError) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else str(error)
        valid = ", ".join(name for name in LoopConfig.model_fields if name != "schema_version")
        raise ConfigError(f"{path}: {problem}; keys are {valid}") from error
    found = load_recipe(config.recipe, workspace=workspace.root)
    if found.model != model:
        raise ConfigError(f"{path}: recipe {config.recipe!r} makes model {found.model!r}, not {model!r}")
    check(config.drift)
    return config


def _recipe_of(workspace: Workspace, model: str) -> str:
    """The recipe that makes this model, where there is one."""
    found = []
    for name, path in recipe_files(workspace.root).items():
        try:
            if (yaml.safe_load(path.read_text()) or {}).get("model") == model:
                found.append(name)
        except (yaml.YAMLError, AttributeError):
            continue
    if len(found) != 1:
        raise ConfigError(
            f"{len(found)} recipes make model {model!r} ({', '.join(sorted(found)) or 'none'}); name one in "
            f"{workspace.root / LOOPS / f'{model}.yaml'}: `recipe: NAME`"
        )
    return found[0]


def configured(workspace: Workspace) -> list[str]:
    """Models that have a loop file."""
    return sorted(path.stem for path in (workspace.root / LOOPS).glob("*.yaml"))


class Loop:
    """One model's loop in a workspace: its configuration and its tables."""

    def __init__(self, workspace: Workspace, settings: Settings, model: str) -> None:
        from monitoring.governor import Governor
        from monitoring.labels import Labels
        from monitoring.outbox import Outbox

        self.workspace, self.settings, self.model = workspace, settings, model
        self.config = load_loop(workspace, model)
        database = open_records(settings.loop_url)
        self.outbox = Outbox(database)
        self.governor = Governor(database, self.config.governor)
        self.labels = Labels(database)

    @property
    def folder(self) -> Path:
        """Where the model's windows lie."""
        return self.workspace.state / "monitoring" / self.model / "windows"
