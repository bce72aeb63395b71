"""JSON Schema of a recipe, with all that a search can vary and its bounds in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from components import plugins
from components.fitting import FittingConfig
from components.phases import Augmentation, Phase
from flows.workspace.recipes import RunConfig

_LUCK = ("schema_version", "seed", "checkpoint_every_s")
"""What a search has no use for."""
_EXAMPLE = {
    "training.phases.1.fit.learning_rate": {"low": 0.0001, "high": 0.003, "log": True},
    "training.phases.1.fit.batch_size": {"choices": [32, 64, 128]},
    "training.phases.1.trains": {"choices": [{"last": 1}, {"last": 2}, {"last": 3}]},
    "training.phases.1.augmentations.mixup.alpha": {"low": 0.05, "high": 0.8},
    "training.phases.1.loss.settings.smoothing": {"low": 0.0, "high": 0.2},
    "training.backbone": {"choices": ["efficientnet_lite0", "efficientnet_lite1"]},
}


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe; `bounds` beside a search's space are the keys that it can hold, and what each takes."""
    found = RunConfig.model_json_schema()
    space = found["$defs"]["SearchConfig"]["properties"]["space"]
    space["minProperties"] = 1
    space["examples"] = [_EXAMPLE]
    space["bounds"] = bounds()
    found["$defs"]["ChosenPass"]["properties"]["settings"]["bounds"] = _members("settings", "passes", "with pass {name}")
    return found


def bounds() -> dict[str, str]:
    """Every key that a search can vary, with N for the number of a phase, and its bounds in words."""
    found: dict[str, str] = {"training.backbone": _one_of(plugins.names("backbones"))}
    found |= _members("training.backbone_settings", "backbones", "with backbone {name}")
    found |= _members("training.task_settings", "tasks", "with task {name}")
    # A recipe of one phase says them once, one of several in each phase.
    found |= {f"training.fit.{key}": told for key, told in _fields(FittingConfig)}
    found |= {f"training.augmentation.{key}": told for key, told in _fields(Augmentation)}
    found |= {
        "training.phases.N.trains": "head, all, or {last: K} for the last K blocks of the backbone, K from 1",
        **{f"training.phases.N.{key}": told for key, told in _fields(Phase) if key in ("views", "sampling", "batch_norm")},
        **{f"training.phases.N.fit.{key}": told for key, told in _fields(FittingConfig)},
        "training.phases.N.loss.loss": _one_of(plugins.names("losses")),
    }
    found |= _members("training.phases.N.loss.settings", "losses", "with loss {name}")
    for name in plugins.names("augmentations"):
        member, _ = plugins.member_class("augmentations", name)
        found |= {f"training.phases.N.augmentations.{name}.{key}": told for key, told in _fields(member)}
    return found


def _members(place: str, family: str, where: str) -> dict[str, str]:
    """The settings of a family's members; those of several have one key, and say whose bounds are whose."""
    found: dict[str, list[str]] = {}
    for name in plugins.names(family):
        member, _ = plugins.member_class(family, name)
        for key, told in _fields(member):
            found.setdefault(f"{place}.{key}", []).append(f"{told} ({where.format(name=name)})")
    return {key: "; ".join(told) for key, told in found.items()}


def _fields(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    properties: Mapping[str, Mapping[str, Any]] = model.model_json_schema().get("properties", {})
    return ((key, _words(told)) for key, told in properties.items() if key not in _LUCK)


def _words(told: Mapping[str, Any]) -> str:
    """A property of a JSON Schema in words."""
    kinds = [one for one in told.get("anyOf", [told]) if one.get("type") != "null"]
    if len(kinds) != 1:
        return "see its own description"
    (one,) = kinds
    values = one.get("enum") or ([one["const"]] if "const" in one else None)
    if values:
        return _one_of([str(value) for value in values])
    kind = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
    bounds = [
        f"{words} {one[key]:g}"
        for key, words in (
            ("minimum", "from"),
            ("exclusiveMinimum", "above"),
            ("maximum", "to"),
            ("exclusiveMaximum", "below"),
        )
        if key in one
    ]
    return " ".join([kind.get(one.get("type", ""), "a value"), *bounds])


def _one_of(names: list[str]) -> str:
    return f"one of {', '.join(names)}"
