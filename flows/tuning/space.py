"""The space of a search, checked against its recipe: what may be tried, and the recipe that a trial trains.

Every value that a trial may have is put where `--set` would put it and is checked as an override is, so that a key that does
not exist and a choice that the recipe refuses are found before any trial.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, JsonValue

from components.contracts.errors import ConfigError, PluginFailed, UnknownName
from components.contracts.wording import counted
from components.search import Dimension, SearchConfig, spelled
from components.training import CHAMPION, TrainingConfig
from flows.training.chosen import ChosenRecipe
from flows.workspace.recipes import RunConfig, resolved, with_values_at

Value = str | int | float
"""What a study keeps of a parameter: a number, or a choice as text."""


@dataclass(frozen=True)
class Parameter:
    """One key of the space."""

    key: str
    dimension: Dimension
    kind: Literal["float", "int", "choice"]
    own: Value | None
    """The recipe's own value; None where the recipe has none, or one that the space does not hold."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The choices as text; empty for numbers."""
        return tuple(spelled(choice) for choice in self.dimension.choices)

    @property
    def low(self) -> float:
        assert self.dimension.low is not None
        return self.dimension.low

    @property
    def high(self) -> float:
        assert self.dimension.high is not None
        return self.dimension.high

    @property
    def step(self) -> float | None:
        """Between numbers that may be tried; None where any may."""
        return self.dimension.step or (1 if self.kind == "int" and not self.dimension.log else None)

    @property
    def size(self) -> float:
        """How many values there are."""
        if self.kind == "choice":
            return len(self.labels)
        if self.kind == "int" and self.dimension.log:
            return self.high - self.low + 1
        return math.inf if self.step is None else math.floor((self.high - self.low) / self.step + 1e-9) + 1

    @property
    def short(self) -> str:
        """The end of its key, for a table."""
        return self.key.removeprefix("training.").removeprefix("phases.")

    def meant(self, value: Value) -> JsonValue:
        """What a value of the study means in a recipe; raises ConfigError for a choice that is none."""
        if self.kind != "choice":
            return value
        by_label = dict(zip(self.labels, self.dimension.choices, strict=True))
        if value not in by_label:
            raise UnknownName(f"choice of {self.key}", str(value), list(by_label))
        return by_label[str(value)]

    def holds(self, value: Any) -> bool:
        """Whether the space has this value of the study."""
        if self.kind == "choice":
            return value in self.labels
        if type(value) not in (int, float) or not self.low <= value <= self.high:
            return False
        if self.kind == "int" and value != int(value):
            return False
        if self.step is None:
            return True
        steps = (value - self.low) / self.step
        return math.isclose(steps, round(steps), abs_tol=1e-9)


@dataclass(frozen=True)
class Space:
    """The keys that a search chooses values for, in the order of the recipe."""

    recipe: ChosenRecipe
    parameters: tuple[Parameter, ...]

    @property
    def size(self) -> float:
        """How many different trials there are."""
        return math.prod(parameter.size for parameter in self.parameters)

    @property
    def own(self) -> dict[str, Value] | None:
        """The recipe's own values; None where the space does not hold them all."""
        found = {parameter.key: parameter.own for parameter in self.parameters if parameter.own is not None}
        return found if len(found) == len(self.parameters) else None

    @property
    def trainings(self) -> list[TrainingConfig]:
        """That of the recipe, and those with each choice in its place: what trials may name, they name."""
        choices = [{one.key: choice} for one in self.parameters for choice in one.dimension.choices]
        return [self.recipe.config.training, *(_with(self.recipe, choice, "").training for choice in choices)]

    def chosen(self, params: Mapping[str, Value]) -> dict[str, JsonValue]:
        """What a trial's values mean in the recipe."""
        return {parameter.key: parameter.meant(params[parameter.key]) for parameter in self.parameters}

    def config(self, params: Mapping[str, Value]) -> RunConfig:
        """The recipe that a trial trains; raises ConfigError where its values do not go together."""
        return _with(self.recipe, self.chosen(params), "the values of this trial")


def space_of(recipe: ChosenRecipe) -> Space:
    """The space of a recipe; raises ConfigError naming the key, and what is wrong with it."""
    config = recipe.config
    if config.search is None:
        raise ConfigError(
            f"recipe {recipe.name!r} has no section search, so there is nothing to search; say what may be tried, such as "
            f"search: {{space: {{training.fit.learning_rate: {{low: 0.0001, high: 0.01, log: true}}}}}}; "
            f"`visionloop recipe schema` has every key with its bounds"
        )
    _expect_no_champion(config.training)
    if config.training.all_phases[-1].head is not None or not config.splitting.valid_share:
        raise ConfigError(
            "a search compares trainings by epochs on the valid images, and this recipe has none (splitting.valid_share: 0) "
            "or computes its head in one step (head); `train --set evaluation.folds=5` estimates such a recipe"
        )
    known = resolved(config)
    return Space(recipe, tuple(_parameter(recipe, key, one, known) for key, one in config.search.space.items()))


def _expect_no_champion(training: TrainingConfig) -> None:
    if training.weights == CHAMPION:
        raise ConfigError(
            "training.weights: champion: trials of a search have to begin from the same weights, and the champion may "
            "change while it goes on; choose other weights, such as the file of a checkpoint"
        )
    if training.teacher is not None and training.teacher.champion:
        raise ConfigError(
            "training.teacher: champion: trials of a search have to learn from the same teacher, and the champion may "
            "change while it goes on; name a checkpoint in its place, such as .visionloop/runs/RUN/3-training"
        )


def _parameter(recipe: ChosenRecipe, key: str, dimension: Dimension, known: Mapping[str, Any]) -> Parameter:
    own = _plain(value_at(known, recipe.config, key))
    if dimension.choices:
        parameter = Parameter(key, dimension, "choice", None)
        given = None if own is None else next((label for label in parameter.labels if label == spelled(own)), None)
        parameter = Parameter(key, dimension, "choice", given)
        _try(recipe, key, dimension.choices)
        return parameter
    low, high = dimension.low, dimension.high
    assert low is not None
    assert high is not None
    _try(recipe, key, (low, high))
    whole = all(isinstance(value, int) for value in (low, high, dimension.step or 0))
    kind: Literal["float", "int"] = "int" if whole and not _takes_fractions(recipe, key, low) else "float"
    parameter = Parameter(key, dimension, kind, None)
    if dimension.step is not None and not parameter.holds(high):
        raise ConfigError(
            f"search.space: {key}: from {low} in steps of {dimension.step} {high} is never reached; choose another high"
        )
    number = own if type(own) in (int, float) and parameter.holds(own) else None
    return Parameter(key, dimension, kind, number if kind == "int" or number is None else float(number))


def _takes_fractions(recipe: ChosenRecipe, key: str, low: float) -> bool:
    """Whether the key takes a number that is not whole: bounds such as 0 and 1 do not tell."""
    try:
        _with(recipe, {key: low + 0.5}, "")
    except ConfigError:
        return False
    return True


def _try(recipe: ChosenRecipe, key: str, values: Sequence[JsonValue]) -> None:
    for value in values:
        try:
            _expect_no_champion(_with(recipe, {key: value}, f"search.space {key!r}").training)
        except PluginFailed:
            raise
        except UnknownName as error:
            raise ConfigError(str(error)) from error
        except ConfigError as error:
            message = str(error).removeprefix(f"search.space {key!r}: ")
            raise ConfigError(
                f"search.space: {key}: {spelled(value)} is refused by the recipe {recipe.name!r}: {message}"
            ) from error


def _with(recipe: ChosenRecipe, chosen: Mapping[str, JsonValue], place: str) -> RunConfig:
    return with_values_at(recipe.config.to_run, chosen, workspace=recipe.workspace.root, place=place)


def _plain(value: Any) -> Any:
    """A value without the marks of records, which no person writes."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: _plain(inside) for key, inside in value.items() if key != "schema_version"}
    return [_plain(inside) for inside in value] if isinstance(value, (list, tuple)) else value


def value_at(values: Mapping[str, Any], config: RunConfig, key: str) -> Any:
    """What a recipe has at a key such as training.fit.epochs, defaults included; None where there is nothing."""
    found = functools.reduce(_inside, key.split("."), values)
    return found if found is not None else functools.reduce(_inside, key.split("."), config)


def _inside(place: Any, part: str) -> Any:
    """The part of a section, or the entry of a list that its number or a plug-in's name means."""
    if isinstance(place, BaseModel):
        return (
            getattr(place, part, None) if part in type(place).model_fields else _inside(getattr(place, "settings", {}), part)
        )
    if isinstance(place, Mapping):
        return (
            place[part]
            if part in place
            else (place["settings"].get(part) if isinstance(place.get("settings"), dict) else None)
        )
    if isinstance(place, (list, tuple)):
        if part.isdecimal():
            return place[int(part)] if int(part) < len(place) else None
        entries = [_plain(entry) for entry in place]
        return next((entry for entry in entries if isinstance(entry, dict) and part in entry.values()), None)
    return None


def told(parameters: Sequence[Parameter], params: Mapping[str, Value]) -> str:
    """A trial's values in a line, in as few characters as they can be told apart."""
    return ", ".join(f"{parameter.short} {shown(params[parameter.key])}" for parameter in parameters)


def shown(value: Value) -> str:
    """A value for a person."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def described(space: Space) -> str:
    """How large the space is, in words."""
    size = "" if math.isinf(space.size) else f", {counted(int(space.size), 'combination')}"
    return f"{counted(len(space.parameters), 'parameter')}{size}"


def searched(config: RunConfig) -> SearchConfig:
    """The section search, which `space_of` has found to be there."""
    assert config.search is not None
    return config.search
