"""The variants of a recipe, every combination checked as the recipe with other values, before anything is computed.

Variants of one network and its passes differ in their engines alone: they share a trunk, which is trained once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from pydantic import JsonValue

from components import plugins
from components.choosing import AUTO, Limits
from components.contracts.errors import ConfigError, PluginFailed
from components.contracts.records import Record, canonical_json
from components.export import TargetConfig
from components.gating import GateConfig
from components.optimisation import ChosenPass
from components.variants import MOST, BackboneChoice, ChoiceConfig, Variant
from flows.training.chosen import ChosenRecipe
from flows.workspace.recipes import RunConfig, with_values_at

Passes = tuple[ChosenPass, ...]


@dataclass(frozen=True)
class Trunk:
    """A network with its passes, and the engines that are built of it."""

    number: int
    backbone: str
    passes: str
    config: RunConfig
    """The recipe that trains it and builds these engines."""
    changed: Mapping[str, JsonValue]
    """What of the recipe's training and optimisation it has otherwise."""
    targets: tuple[TargetConfig, ...]

    @property
    def name(self) -> str:
        return f"{self.backbone} / {self.passes}"

    @property
    def folder(self) -> str:
        """Its name as that of a folder."""
        return f"{self.number}-{re.sub(r'[^a-z0-9_.=]+', '-', self.name.lower()).strip('-')[:60]}"

    def variant(self, engine: str, **facts: Any) -> Variant:
        """One of its variants."""
        name = f"{self.name} / {engine}"
        return Variant(name=name, backbone=self.backbone, passes=self.passes, engine=engine, **facts)


@dataclass(frozen=True)
class Expansion:
    """All variants of a recipe."""

    recipe: ChosenRecipe
    trunks: tuple[Trunk, ...]
    left_out: tuple[Variant, ...]
    """Those that cannot be, or not on this machine, with the reason."""

    @property
    def config(self) -> ChoiceConfig:
        return choice_of(self.recipe)

    @property
    def size(self) -> int:
        return sum(len(trunk.targets) for trunk in self.trunks) + len(self.left_out)

    @property
    def limits(self) -> Limits | None:
        """The recipe's limits, which hold where they choose what serves, or where a person named some."""
        return limits_of(self.recipe.config)

    def with_engines(self, trunk: Mapping[str, JsonValue], targets: Sequence[TargetConfig]) -> dict[str, JsonValue]:
        """What a recipe has otherwise that trains a trunk and builds these engines alone."""
        return {**trunk, **_engines(self.recipe.config, targets)}


def choice_of(recipe: ChosenRecipe) -> ChoiceConfig:
    """The section choice; raises ConfigError where the recipe has none, or cannot be chosen by."""
    config = recipe.config
    if config.choice is None:
        raise ConfigError(
            f"recipe {recipe.name!r} has no section choice, so there is nothing to choose from; say what is compared, such "
            f"as choice: {{passes: [[], [{{pass: prune}}]], targets: [{{target: openvino}}, {{target: openvino, precision: "
            f"int8}}]}}; `visionloop recipe schema` has every key with its bounds"
        )
    if not config.splitting.valid_share:
        raise ConfigError(
            "variants are compared on valid images, and there are none (splitting.valid_share: 0); raise it: the test "
            "images judge what was chosen, and choose nothing"
        )
    return config.choice


def limits_of(config: RunConfig) -> Limits | None:
    return config.export.limits if config.export.serving == AUTO or config.export.limits != Limits() else None


def expanded(recipe: ChosenRecipe) -> Expansion:
    """Every combination, each checked; raises ConfigError for what can be part of none, and for too few or too many."""
    config, choice = recipe.config, choice_of(recipe)
    backbones: Sequence[BackboneChoice | None] = choice.backbones or (None,)
    passes: Sequence[Passes | None] = choice.passes or (None,)
    targets = choice.targets or tuple(t for t in config.export.all_targets if t.target != "torch_reference")
    number = len(backbones) * len(passes) * len(targets)
    if not 1 < number <= MOST:
        told = f"{len(backbones)} x {len(passes)} x {len(targets)} (backbones, passes, targets)"
        raise ConfigError(
            f"choice: {told} {'is one variant, which leaves nothing to choose' if number < 2 else 'are too many variants'}; "
            f"name what makes 2 to {MOST} of them"
        )
    found, left_out = _checked(recipe, backbones, passes, targets)
    trunks = [_without_absent(recipe, trunk, left_out) for trunk in _numbered(recipe, found)]
    trunks = [trunk for trunk in trunks if trunk.targets]
    if not trunks:
        reasons = "; ".join(dict.fromkeys(f"{variant.engine}: {variant.reason}" for variant in left_out))
        raise ConfigError(f"choice: no engine of any variant can be built here: {reasons}. Name another target")
    return Expansion(recipe, tuple(trunks), tuple(left_out))


@dataclass(frozen=True)
class _Possible:
    backbone: str
    passes: str
    changed: Mapping[str, JsonValue]
    targets: tuple[TargetConfig, ...]


def _checked(
    recipe: ChosenRecipe,
    backbones: Sequence[BackboneChoice | None],
    passes: Sequence[Passes | None],
    targets: Sequence[TargetConfig],
) -> tuple[list[_Possible], list[Variant]]:
    """The combinations that can be, and those that cannot; what can be in none is refused."""
    backbone_names, pass_names = _backbone_names(recipe, backbones), _pass_names(recipe, passes)
    problems: dict[tuple[int, int, int], str] = {}
    found: list[_Possible] = []
    left_out: list[Variant] = []
    seen: set[str] = set()
    for (b, backbone), (p, of_passes) in product(enumerate(backbones), enumerate(passes)):
        changed = _changed(recipe.config, backbone, of_passes)
        possible: list[TargetConfig] = []
        for t, target in enumerate(targets):
            name = f"{backbone_names[b]} / {pass_names[p]} / {target.name}"
            config, problem = _tried(recipe, changed, target, f"variant {name}")
            if config is None:
                problems[b, p, t] = problem
                left_out.append(
                    Variant(
                        name=name,
                        backbone=backbone_names[b],
                        passes=pass_names[p],
                        engine=target.name,
                        status="impossible",
                        reason=problem,
                    )
                )
                continue
            same = canonical_json([config.training.to_json(), config.optimisation.to_json(), target.name])
            if same not in seen:
                possible.append(target)
            seen.add(same)
        if possible:
            found.append(_Possible(backbone_names[b], pass_names[p], changed, tuple(possible)))
    _expect_some(problems, len(backbones), len(passes), len(targets))
    return found, left_out


def _expect_some(problems: Mapping[tuple[int, int, int], str], *numbers: int) -> None:
    """Raise ConfigError for an entry of a list that can be part of no variant."""
    for axis, key in enumerate(("backbones", "passes", "targets")):
        for entry in range(numbers[axis]):
            at = [(b, p, t) for b, p, t in product(*map(range, numbers)) if (b, p, t)[axis] == entry]
            if all(place in problems for place in at):
                raise ConfigError(f"choice.{key}.{entry} can be part of no variant: {problems[at[0]]}")


def _numbered(recipe: ChosenRecipe, found: Sequence[_Possible]) -> Iterator[Trunk]:
    for number, each in enumerate(found, 1):
        # Of one trunk the recipe that builds all its engines; each of them was checked alone.
        values = {**each.changed, **_engines(recipe.config, each.targets)}
        config = _with(recipe, values, f"variants {each.backbone} / {each.passes}")
        yield Trunk(number, each.backbone, each.passes, config, each.changed, each.targets)


def _without_absent(recipe: ChosenRecipe, trunk: Trunk, left_out: list[Variant]) -> Trunk:
    """The trunk without engines that cannot be built on this machine, which are told."""
    reasons = {one.name: plugins.load("targets", one.target, one.settings).absent() for one in trunk.targets}
    there = tuple(one for one in trunk.targets if not reasons[one.name])
    if there == trunk.targets:
        return trunk
    left_out += [trunk.variant(name, status="not executed here", reason=why) for name, why in reasons.items() if why]
    values = {**trunk.changed, **_engines(recipe.config, there)}
    config = _with(recipe, values, f"variants {trunk.name}") if there else trunk.config
    return Trunk(trunk.number, trunk.backbone, trunk.passes, config, trunk.changed, there)


def _changed(config: RunConfig, backbone: BackboneChoice | None, passes: Passes | None) -> dict[str, JsonValue]:
    changed: dict[str, JsonValue] = {}
    if backbone is not None:
        changed = {"training.backbone": backbone.backbone, "training.backbone_settings": dict(backbone.settings)}
        if backbone.weights is not None:
            changed["training.weights"] = backbone.weights
        changed |= backbone.values
    if passes is not None:
        section: dict[str, JsonValue] = {"passes": [_as_said(each) for each in passes]}
        if not config.optimisation.compare:
            section["compare"] = False
        changed["optimisation"] = section if passes else {}
    return changed


def _engines(config: RunConfig, targets: Sequence[TargetConfig]) -> dict[str, JsonValue]:
    """What the recipe says of engines, for these alone: of several none that cannot be built fails another."""
    names = [target.name for target in targets]
    several = len(names) > 1
    told = [{key: value for key, value in _as_said(target).items() if key != "required"} for target in targets]
    found: dict[str, JsonValue] = {
        "export.targets": [{**one, "required": False} if several else one for one in told],
        "export.serving": AUTO if several or limits_of(config) is not None else names[0],
    }
    gates = _gates(config, names)
    if gates != list(config.gating.gates):
        found["gating.gates"] = [_as_said(gate) for gate in gates]
    return found


def _gates(config: RunConfig, engines: Sequence[str]) -> list[GateConfig]:
    """The gates that judge some of these engines; those that name others do not."""
    found = []
    for gate in config.gating.gates:
        kept = tuple(name for name in gate.engines if name in engines)
        if kept or not gate.engines:
            found.append(gate.model_copy(update={"engines": kept}) if gate.engines else gate)
    if not found:
        raise ConfigError(
            f"no gate of the recipe judges {', '.join(engines)}; name it under engines of one, or name none there"
        )
    return found


def _as_said(record: Record) -> dict[str, JsonValue]:
    """A part of a recipe as a person wrote it, without what was not said."""
    said: dict[str, JsonValue] = record.model_dump(mode="json", exclude_unset=True)
    return said


def _tried(
    recipe: ChosenRecipe, changed: Mapping[str, JsonValue], target: TargetConfig, place: str
) -> tuple[RunConfig | None, str]:
    try:
        return _with(recipe, {**changed, **_engines(recipe.config, [target])}, place), ""
    except PluginFailed:
        raise
    except ConfigError as error:
        return None, str(error).removeprefix(f"{place}: ")


def _with(recipe: ChosenRecipe, values: Mapping[str, JsonValue], place: str) -> RunConfig:
    return with_values_at(recipe.config.to_run, values, workspace=recipe.workspace.root, place=place)


def _backbone_names(recipe: ChosenRecipe, backbones: Sequence[BackboneChoice | None]) -> list[str]:
    """As short as tells them apart: settings that all networks of one kind share are left out."""
    training = recipe.config.training
    options = [
        one or BackboneChoice(backbone=training.backbone, settings=dict(training.backbone_settings)) for one in backbones
    ]
    names = []
    for one in options:
        alike = [other for other in options if other.backbone == one.backbone]
        told = {key: value for key, value in one.settings.items() if any(_differs(key, value, other) for other in alike)}
        told.pop("architecture", None)
        name = str(one.settings.get("architecture", one.backbone))
        if any(other.weights != one.weights for other in alike):
            told["weights"] = one.weights or training.weights
        if any(other.values != one.values for other in alike):
            told |= {key.rpartition(".")[2]: value for key, value in one.values.items()}
        names.append(" ".join([name, *(f"{key}={_short(value)}" for key, value in told.items())]))
    return _unique(names)


def _differs(key: str, value: Any, other: BackboneChoice) -> bool:
    return bool(other.settings.get(key) != value)


def _pass_names(recipe: ChosenRecipe, passes: Sequence[Passes | None]) -> list[str]:
    names = []
    for one in passes:
        chosen = recipe.config.optimisation.passes if one is None else one
        told = [
            " ".join([each.pass_, *(f"{key}={_short(value)}" for key, value in each.settings.items())]) for each in chosen
        ]
        names.append(" + ".join(told) or "no pass")
    return _unique(names)


def _unique(names: Sequence[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, 1)]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."
