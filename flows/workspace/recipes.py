"""Recipes: YAML files parsed into RunConfig, one section per stage. A typo dies here, before any work."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import (
    BaseModel,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from components import plugins
from components.contracts.errors import ConfigError, PluginFailed, UnknownName
from components.contracts.records import Record, plain
from components.evaluation import EvaluationConfig
from components.evidence import EvidenceConfig
from components.export import ExportConfig
from components.export import check as check_export
from components.gating import GatingConfig
from components.gating import check as check_gating
from components.issues import chosen as chosen_findings
from components.optimisation import OptimisationConfig, fine_tuning
from components.optimisation import check as check_optimisation
from components.packaging import PackagingConfig
from components.search import SearchConfig, Tuned
from components.splitting import SplittingConfig
from components.training import CHAMPION, TrainingConfig, begins_from_a_model, expect_valid
from components.training import check as check_training
from components.validation import ValidationConfig
from components.validation import check as check_validation
from components.variants import ChoiceConfig, Chosen
from flows.workspace.yaml_reading import parse_yaml, read_mapping

SHIPPED = Path(__file__).resolve().parent.parent / "recipes"
SUFFIXES = (".yml", ".yaml")
_ABSENT = ("search", "tuned", "choice", "chosen")
"""Sections that are left out of JSON where there is none, so that what an older recipe makes keeps its digest."""
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


class RunConfig(Record):
    """One run, completely: every default is written out in the run folder and in MLflow."""

    name: str
    model: str
    """Registered model name; part of every key in the ledger."""
    description: str = ""
    source: str | None = None
    """Source plug-in that can make the pinned data where `data/` is empty; none for a folder of one's own."""
    source_settings: dict[str, bool | int | float | str] = {}
    validation: ValidationConfig = ValidationConfig()
    splitting: SplittingConfig = SplittingConfig()
    training: TrainingConfig
    optimisation: OptimisationConfig = OptimisationConfig()
    """As JSON it is left out where it names no pass, so that what an older recipe makes keeps its digest."""
    export: ExportConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    gating: GatingConfig
    packaging: PackagingConfig = PackagingConfig()
    evidence: EvidenceConfig = EvidenceConfig()
    search: SearchConfig | None = None
    """What `visionloop tune` tries; a run of the recipe itself ignores it."""
    tuned: Tuned | None = None
    """The search that found the recipe's values; written by `visionloop tune`."""
    choice: ChoiceConfig | None = None
    """What `visionloop choose` compares; a run of the recipe itself ignores it."""
    chosen: Chosen | None = None
    """The choice that the recipe's values come from; written by `visionloop choose`."""

    @model_serializer(mode="wrap")
    def _as_said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        left_out = () if self.optimisation.passes else ("optimisation",)
        values = {key: value for key, value in handler(self).items() if key not in left_out}
        return {key: value for key, value in values.items() if key not in _ABSENT or value is not None}

    @property
    def to_run(self) -> RunConfig:
        """What a run of the recipe does, which neither a search nor a choice is part of."""
        if self.search is None and self.choice is None:
            return self
        return self.model_copy(update={"search": None, "choice": None})

    @model_validator(mode="after")
    def _folds_are_unseen(self) -> RunConfig:
        if self.evaluation.folds and self.training.weights == CHAMPION:
            raise ValueError(
                "evaluation.folds judge models that never saw the images, and a champion saw them; leave the folds out, or "
                "choose other training.weights"
            )
        if self.evaluation.folds and self.training.teacher is not None:
            raise ValueError(
                "evaluation.folds judge models that never saw the images, and the teacher, whose answers are learned, did; "
                "leave the folds out, or remove training.teacher"
            )
        return self

    @field_validator("name", "model")
    @classmethod
    def _plain(cls, value: str) -> str:
        expect_plain_name(value)
        return value


def expect_plain_name(value: str) -> None:
    """Raise ConfigError unless a recipe or a model can be named like this."""
    if not _NAME.fullmatch(value):
        raise ConfigError(f"{value!r} is not a plain name; use a-z, 0-9, '.', '_' and '-', at most 63")


def recipe_files(workspace: Path | None) -> dict[str, Path]:
    """Every recipe by name: the shipped ones and the workspace's own, which win."""
    folders = [SHIPPED, *([workspace / "recipes"] if workspace else [])]
    return {path.stem: path for folder in folders for suffix in SUFFIXES for path in sorted(folder.glob(f"*{suffix}"))}


def _values(path: Path) -> dict[str, Any]:
    twin = path.with_suffix(".yml")
    if path.suffix == ".yaml" and twin.exists():
        raise ConfigError(f"{path} and {twin.name} are both recipe {path.stem!r}; remove or rename one")
    return read_mapping(path, "recipe")


def peek(path: Path) -> RunConfig:
    """A recipe's sections as they are, without asking whether what they name exists; raises ConfigError."""
    return parse(_values(path), place=str(path))


def load_recipe(recipe: str, overrides: Sequence[str] = (), *, workspace: Path | None = None) -> RunConfig:
    """The recipe of this name or path with `section.key=value` overrides; raises ConfigError naming the key.

    An entry of a list goes by its plug-in's name; what it has no key for is a setting: `gating.gates.accuracy.floor=0.9`.
    Everything it names (plug-ins, their settings, weights, engines) is checked to exist.
    """
    path = recipe_path(recipe, workspace)
    place = " ".join([str(path), *(f"--set {override}" for override in overrides)])
    return _checked(parse(values_of(path, overrides), place=place), place, workspace or Path())


def recipe_path(recipe: str, workspace: Path | None) -> Path:
    """The file of the recipe of this name or path; raises UnknownName."""
    files = recipe_files(workspace)
    path = Path(recipe) if recipe.endswith(SUFFIXES) else files.get(recipe)
    if path is None:
        raise UnknownName("recipe", recipe, list(files))
    return path


def values_of(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a recipe's file says, with overrides; raises ConfigError."""
    values: dict[str, Any] = _unshared(_values(path))
    for override in overrides:
        _apply(values, override)
    return values


def with_values_at(config: RunConfig, chosen: Mapping[str, Any], *, workspace: Path | None, place: str) -> RunConfig:
    """The recipe with other values for some keys, spelled as for --set, checked as overrides are; raises ConfigError."""
    values = _unshared(config.to_json())
    for key, value in chosen.items():
        put(values, key, value, place)
    return _checked(parse(values, place=place), place, workspace or Path())


def _checked(config: RunConfig, place: str, workspace: Path) -> RunConfig:
    """The config, once all that it names is known to exist and to fit; raises ConfigError."""
    try:
        check_validation(config.validation)
        check_training(config.training, workspace)
        _expect_unseen(config, workspace)
        _expect_pictures(config)
        check_optimisation(config.optimisation, config.training)
        check_export(config.export)
        _expect_used(config)
        check_gating(
            config.gating,
            [target.name for target in config.export.all_targets],
            robustness_images=config.evaluation.robustness_images,
        )
        if config.source is not None:
            plugins.load("sources", config.source, dict(config.source_settings))
    except PluginFailed:
        raise  # it names a file of its own
    except ConfigError as error:
        error.args = (f"{place}: {error}",)
        raise
    return config


def _expect_pictures(config: RunConfig) -> None:
    """Raise ConfigError where a split has no pictures that something of the recipe needs."""
    expect_valid(config.training, config.splitting.valid_share)
    if config.optimisation.passes and not config.splitting.valid_share:
        raise ConfigError(
            "optimisation.passes: the epochs of a fine-tuning are chosen on valid images, and there are none; raise "
            "splitting.valid_share above 0, or name no pass"
        )
    int8 = [target.name for target in config.export.all_targets if target.precision == "int8"]
    if int8 and config.splitting.none:
        raise ConfigError(
            f"splitting.{config.splitting.none[0]}_share is 0, and {int8[0]} chooses its ranges on calibration pictures and "
            f"is measured on valid ones; raise it, or leave {', '.join(int8)} out of export.targets"
        )


def _expect_used(config: RunConfig) -> None:
    """Raise ConfigError for a pass that no engine of the recipe has a use for."""
    for number, chosen in enumerate(config.optimisation.passes):
        precision = chosen.only_for
        if precision and all(target.precision != precision for target in config.export.all_targets):
            raise ConfigError(
                f"optimisation.passes.{number}: the pass {chosen.pass_!r} has no effect without an engine in {precision}; "
                f"name one under export.targets, such as {{target: openvino, precision: {precision}}}, or remove the pass"
            )


def _expect_unseen(config: RunConfig, root: Path) -> None:
    """Raise ConfigError where folds would judge a network that began from a model which has seen the images."""
    if config.evaluation.folds and begins_from_a_model(config.training, root):
        raise ConfigError(
            f"evaluation.folds judge models that never saw the images, and training.weights: {config.training.weights} are "
            f"of a checkpoint, whose training may have seen any of them; leave the folds out, or choose other "
            f"training.weights"
        )


@dataclass(frozen=True)
class KnownRecipes:
    """Every recipe of a workspace by name: those that can be used, and those that cannot."""

    descriptions: dict[str, str]
    problems: dict[str, str]


def known_recipes(workspace: Path | None) -> KnownRecipes:
    """The shipped recipes and the workspace's own, which are checked as a run would.

    The shipped ones were checked before they were shipped: that would load their networks' libraries for a list.
    """
    found = KnownRecipes({}, {})
    for name, path in sorted(recipe_files(workspace).items()):
        try:
            config = peek(path) if path.parent == SHIPPED else load_recipe(name, workspace=workspace)
            found.descriptions[name] = config.description
        except ConfigError as error:
            found.problems[name] = str(error)
    return found


def resolved(config: RunConfig) -> dict[str, Any]:
    """What a run of this recipe uses: every default written out, those of its plug-ins too. A recipe again."""
    values = config.to_json()

    def settings(family: str, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        # A setting of no value, such as a size that is the weights' own, is one that is not said.
        found: dict[str, Any] = plugins.load(family, name, dict(given)).model_dump(mode="json", exclude_none=True)
        return found

    training = values["training"]
    for family, key in (("backbones", "backbone"), ("tasks", "task")):
        training[f"{key}_settings"] = settings(family, training[key], training[f"{key}_settings"])
    if config.optimisation.passes:
        for one, said in zip(config.optimisation.passes, values["optimisation"]["passes"], strict=True):
            said["settings"] = settings("passes", one.pass_, one.settings)
            said["phases"] = [phase.to_json() for phase in fine_tuning(one, config.training)]
    phases = [
        *training.get("phases", []),
        *(p for said in values.get("optimisation", {}).get("passes", []) for p in said["phases"]),
    ]
    for phase in phases:
        for chosen in [phase["loss"]] if phase["loss"] else []:
            chosen["settings"] = settings("losses", chosen["loss"], chosen["settings"])
        for chosen in phase["augmentations"]:
            chosen["settings"] = settings("augmentations", chosen["augmentation"], chosen["settings"])
    values["validation"]["findings"] = [
        each.model_dump(exclude={"schema_version"}) | {"settings": settings("findings", each.finding, each.settings)}
        for each in chosen_findings(config.validation.findings)
    ]
    for target in values["export"]["targets"]:
        target["settings"] = settings("targets", target["target"], target["settings"])
    for gate in values["gating"]["gates"]:
        gate["settings"] = settings("gates", gate["gate"], gate["settings"])
    return values


def parse(values: dict[str, Any], *, place: str) -> RunConfig:
    """Values to RunConfig; raises ConfigError that names the key and, for an unknown one, the valid keys."""
    try:
        return RunConfig.model_validate_json(json.dumps(values), strict=True)
    except (TypeError, ValueError) as error:
        if not isinstance(error, ValidationError):
            raise ConfigError(f"{place}: {error}") from error
        problem = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            valid = _fields(problem["loc"][:-1])
            raise UnknownName(f"key in {place}:", key, valid) from error
        raise ConfigError(f"{place}: {f'{key}: ' if key else ''}{plain(problem)}{_hint(problem)}") from error


def _hint(problem: Mapping[str, Any]) -> str:
    """What was given instead, where YAML may have read a plain value as something else than was meant."""
    given, kind = problem["input"], problem["type"]
    if kind in ("missing", "value_error"):
        return ""  # the message says it
    if isinstance(given, (list, dict)):
        return ", not a list" if isinstance(given, list) else ", not a section"
    if not isinstance(given, (str, bool, int, float, type(None))):
        return ""
    shown = json.dumps(given, ensure_ascii=False)[:60]
    if kind == "string_type":
        return f", not {shown}; quote it, such as '{shown}'"
    if kind == "bool_type":
        return f", not {shown}; write true or false"
    return f", not {shown}"


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise ConfigError(f"--set {override!r} is not of the form section.key=value, such as training.fit.epochs=5")
    said = f"--set {override!r}"
    put(values, key, parse_yaml(text, f"the value of {said}"), said)


def put(values: dict[str, Any], key: str, value: Any, said: str) -> None:
    """Put a value where a key such as `training.phases.0.fit.epochs` says; `said` tells errors where that was asked for."""
    path = key.split(".")
    last = path[-1]
    place: Any = values
    location: list[str] = []
    for part, following in itertools.pairwise(path):
        if isinstance(place, list):
            place, part = _entry(place, location[-1], part, said), location[-1]
            fields = _fields(tuple(location))
            if "settings" in fields and following not in fields:
                place, part = place.setdefault("settings", {}), "settings"
        else:
            place = place.setdefault(part, {})
            location.append(part)
        if not isinstance(place, (dict, list)):
            raise ConfigError(f"{said}: {part!r} is a value, not a section")
    if isinstance(place, list):
        _entry(place, location[-1], last, said)
        raise ConfigError(f"{said}: {last!r} is an entry of {location[-1]!r}; name a key of it, such as {key}.KEY")
    place[last] = value


def _entry(entries: list[Any], key: str, name: str, said: str) -> dict[str, Any]:
    """The entry of a list that a plug-in's name, or an engine's such as openvino-int8, means; raises ConfigError.

    Entries that name no plug-in, such as phases, are known by their number, counted from 0.
    """
    families = [plugins.singular(family) for family in plugins.FAMILIES]
    named: dict[str, list[dict[str, Any]]] = {}
    engines: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        for family in families:
            # A phase's loss is a table of its own, and no name of the entry.
            if isinstance(entry, dict) and isinstance(entry.get(family), str):
                named.setdefault(entry[family], []).append(entry)
                if family == "target":
                    engines.setdefault(f"{entry['target']}-{entry.get('precision', 'fp32')}", []).append(entry)
    numbered = {str(number): entry for number, entry in enumerate(entries) if isinstance(entry, dict)}
    if numbered and not named:
        if name not in numbered:
            raise UnknownName(f"entry of {key!r} in {said}:", name, list(numbered))
        return numbered[name]
    valid = [*named, *engines]
    if name.isdecimal() or not valid:
        raise ConfigError(
            f"{said}: {key!r} is a list, whose items cannot be set one by one; give it whole, "
            f"as it stands in the recipe: {key}=[...]" + (f"; or name one of them: {', '.join(valid)}" if valid else "")
        )
    found = engines.get(name) or named.get(name)
    if not found:
        raise UnknownName(f"entry of {key!r} in {said}:", name, valid)
    if len(found) > 1:
        meant = [engine for engine, of in engines.items() if of[0] in found]
        instead = f"name one of {', '.join(meant)}" if len(meant) > 1 else f"give the list whole: {key}=[...]"
        raise ConfigError(f"{said}: {len(found)} entries of {key!r} are {name!r}; {instead}")
    return found[0]


def _unshared(value: Any) -> Any:
    """A copy in which no two places are one object, as aliases of YAML make them: an override is of one place."""
    if isinstance(value, dict):
        return {key: _unshared(inside) for key, inside in value.items()}
    return [_unshared(inside) for inside in value] if isinstance(value, list) else value


def _fields(location: tuple[int | str, ...]) -> list[str]:
    """Field names of the model at this place of RunConfig."""
    model: Any = RunConfig
    named = False
    for part in location:
        if isinstance(part, int) or named:
            named = False
            continue
        if part not in model.model_fields:
            return []
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation), *(a for c in get_args(annotation) for a in get_args(c))]
        models = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not models:
            return []
        model = models[0]
        # The next part is a key of the mapping, and no field.
        named = get_origin(annotation) is dict
    return [field.alias or name for name, field in model.model_fields.items() if name != "schema_version"]
