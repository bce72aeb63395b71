"""A workspace's own plug-ins: a new one to start from, and what one does against its family's contract."""

from __future__ import annotations

import contextlib
import inspect
import keyword
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from components import plugins
from components.conformance import check_class, class_breaches, place_of
from components.contract_checks import PROBES
from components.contracts.errors import ConfigError, EngineUnavailable, UnknownName, VisionloopError, in_short
from components.contracts.records import Record
from flows.workspace.recipes import peek, recipe_files
from monitoring.detector_checks import detector_breaches

_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
_PROBES = {**PROBES, "detectors": detector_breaches}


class NewPlugin(Record):
    """What was written."""

    family: str
    name: str
    file: str
    """Within the workspace."""


class PluginFinding(Record):
    """One thing that a plug-in does against its family's contract."""

    family: str
    name: str
    file: str
    """Within the workspace."""
    line: int
    message: str


class PluginsChecked(Record):
    """Which plug-ins were tried, and what was found."""

    checked: tuple[str, ...]
    """As FAMILY/NAME."""
    not_executed_here: tuple[str, ...] = ()
    """Those of them that this machine lacks something for, with the reason; what could be was looked at."""
    findings: tuple[PluginFinding, ...] = ()


def new_plugin(workspace: Path, family: str, name: str) -> NewPlugin:
    """Write `plugins/FAMILY/NAME.py` of a workspace: a small working member to edit.

    Raises ConfigError for an unknown family, a file that is there, and a name that is a shipped member's or no module's.
    """
    template = plugins.template(family)
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise ConfigError(
            f"{name!r} is no name of a Python module; use a-z, 0-9 and '_', a letter first, "
            f"such as my_{plugins.singular(family)}"
        )
    if name in plugins.shipped(family):
        raise ConfigError(f"{name!r} is the name of a shipped {plugins.singular(family)}; choose another")
    path = workspace / "plugins" / family / f"{name}.py"
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} is there already and is left as it is; choose another name, or move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.write(template.read_text(encoding="utf-8").replace('"template"', f'"{name}"'))
    return NewPlugin(family=family, name=name, file=path.relative_to(workspace).as_posix())


def check_plugins(workspace: Path, family: str | None = None, name: str | None = None) -> PluginsChecked:
    """Try a workspace's own plug-ins (all, a family's, or one); raises UnknownName for one that it does not have."""
    families = [family] if family is not None else list(plugins.FAMILIES)
    found = [(each, stem, path) for each in families for stem, path in plugins.own(each).items()]
    if name is not None:
        if name not in [stem for _, stem, _ in found]:
            raise UnknownName(f"plug-in of the workspace in {family}", name, [stem for _, stem, _ in found])
        found = [entry for entry in found if entry[1] == name]
    absent: list[str] = []
    findings = [
        PluginFinding(family=each, name=stem, file=Path(file).relative_to(workspace).as_posix(), line=line, message=message)
        for each, stem, path in found
        for file, line, message in _tried(workspace, each, stem, path, absent)
    ]
    return PluginsChecked(
        checked=tuple(f"{each}/{stem}" for each, stem, _ in found), not_executed_here=tuple(absent), findings=tuple(findings)
    )


def _tried(workspace: Path, family: str, name: str, path: Path, absent: list[str]) -> Iterator[tuple[str, int, str]]:
    """File, line and message of everything that is wrong with one plug-in."""
    kind: Any = None
    try:
        kind, doc = plugins.member_class(family, name)
        check_class(plugins.FAMILIES[family], kind, path)
        for breach in class_breaches(kind, doc):
            yield str(path), _line(kind, breach.method), breach.message
        given = _settings(workspace, family, name)
        required = [key for key, field in kind.model_fields.items() if field.is_required() and key not in given]
        if required:
            told = f"{', '.join(required)} has no default and no recipe of the workspace sets it, so it cannot be tried"
            yield str(path), _line(kind, ""), f"{told}; add it to a recipe, or give it a default"
            return
        member = plugins.load(family, name, given)
        for breach in _PROBES[family](member, name):
            yield str(path), _line(kind, breach.method), breach.message
    except EngineUnavailable as error:
        absent.append(f"{family}/{name}: {error}")
    except Exception as error:
        # Whatever a person's own code raises is what is to be told about it.
        place = place_of(error, path.parent.parent)
        file, _, line = place.rpartition(":") if place else (str(path), "", "0")
        told = str(error) if isinstance(error, VisionloopError) else f"raised {in_short(error)}"
        yield file, int(line) or _line(kind, getattr(error, "method", "")), told


def _settings(workspace: Path, family: str, name: str) -> dict[str, Any]:
    """What the first recipe of the workspace that names a plug-in sets for it."""
    for path in recipe_files(workspace).values():
        with contextlib.suppress(ConfigError):
            config = peek(path)
            passes = config.optimisation.passes
            phases = [*config.training.all_phases, *(phase for one in passes for phase in one.phases)]
            used: list[tuple[str, str, Mapping[str, Any]]] = [
                ("backbones", config.training.backbone, config.training.backbone_settings),
                ("sources", config.source or "", config.source_settings),
                ("tasks", config.training.task, config.training.task_settings),
                *(("passes", one.pass_, one.settings) for one in passes),
                *(("losses", one.loss, one.settings) for phase in phases if (one := phase.loss)),
                *(("augmentations", one.augmentation, one.settings) for phase in phases for one in phase.augmentations),
                *(("targets", target.target, target.settings) for target in config.export.targets),
                *(("findings", each.finding, each.settings) for each in config.validation.findings or ()),
                *(("gates", gate.gate, gate.settings) for gate in config.gating.gates),
            ]
            for of, called, settings in used:
                if (of, called) == (family, name):
                    return dict(settings)
    return {}


def _line(kind: Any, method: str) -> int:
    """The line of a method, or of the class; 1 where there is none."""
    if not isinstance(kind, type):
        return 1
    found = vars(kind).get(method)
    function = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
    return function.__code__.co_firstlineno if inspect.isfunction(function) else inspect.getsourcelines(kind)[1]
