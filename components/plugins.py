"""Families: one file a member, the file name is the key, the class inside carries the family's name.

A member is looked for in the package's own folder and in the workspace's `plugins/<family>/`. A workspace may add
members; it may not shadow a shipped one. A workspace's own member is checked against the family's protocol when it is
loaded, and so is everything that it answers (components/conformance.py): what is wrong with it is told by file and line.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from pydantic import ValidationError

from components.conformance import CheckedPlugin, check_class, failed
from components.contracts.errors import ConfigError, PluginFailed, UnknownName, VisionloopError
from components.contracts.records import first_problem

FAMILIES = {
    "sources": "Source",
    "targets": "Target",
    "gates": "Gate",
    "tasks": "Task",
    "backbones": "Backbone",
    "losses": "Loss",
    "augmentations": "Augmentation",
    "passes": "Pass",
    "findings": "Finding",
    "detectors": "Detector",
}
_ROOT = Path(__file__).resolve().parent
_HOMES = {"detectors": _ROOT.parent / "monitoring"}
"""Packages of the families that do not live here."""
_workspace_plugins: list[Path] = []


def use_workspace(folder: Path | None) -> None:
    """Look for members in `folder/<family>/` too, or (None) in the package alone."""
    _workspace_plugins[:] = [folder] if folder is not None else []


def singular(family: str) -> str:
    """One of a family, in words and in recipes."""
    return FAMILIES[family].lower()


def _members(family: str) -> dict[str, Path]:
    if family not in FAMILIES:
        raise UnknownName("plug-in family", family, list(FAMILIES))
    found: dict[str, Path] = {}
    for root in (home(family), *_workspace_plugins):
        for path in sorted((root / family).glob("[!_]*.py")):
            if path.stem in found:
                raise ConfigError(f"{path} has the name of a shipped {family} member; rename it")
            found[path.stem] = path
    return found


def home(family: str) -> Path:
    """The package that holds a family's folder."""
    return _HOMES.get(family, _ROOT)


def names(family: str) -> list[str]:
    """Keys of a family's members."""
    return sorted(_members(family))


def shipped(family: str) -> list[str]:
    """Keys of the members that visionloop ships."""
    return [name for name, path in _members(family).items() if path.parent.parent == home(family)]


def own(family: str) -> dict[str, Path]:
    """The workspace's own members of a family, and their files."""
    return {name: path for name, path in _members(family).items() if path.parent.parent != home(family)}


def template(family: str) -> Path:
    """The file that a new member of a family starts from; raises UnknownName."""
    found = {each: home(each) / each / "_template.py" for each in FAMILIES}
    found = {each: path for each, path in found.items() if path.is_file()}
    if family not in found:
        raise UnknownName("plug-in family", family, list(found))
    return found[family]


def _module(family: str, name: str) -> ModuleType:
    members = _members(family)
    if name not in members:
        raise UnknownName(singular(family), name, list(members))
    path = members[name]
    if path.parent.parent == home(family):
        return importlib.import_module(f"{home(family).name}.{family}.{name}")
    key = f"visionloop_workspace_plugins.{family}.{name}"
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    try:
        spec.loader.exec_module(module)
    except VisionloopError:
        raise
    except (Exception, SystemExit) as error:
        del sys.modules[key]
        raise failed(f"{singular(family)} {name!r}", path, "could not be loaded", error) from error
    return module


def member_class(family: str, name: str) -> tuple[Any, str | None]:
    """What a member's file calls as its family is called, and its docstring; raises PluginFailed where it has none."""
    module = _module(family, name)
    member = getattr(module, FAMILIES[family], None)
    if member is None:
        raise PluginFailed(f"{module.__file__} defines no class {FAMILIES[family]}; a {family} member needs one")
    return member, module.__doc__


def load(family: str, name: str, settings: dict[str, Any] | None = None) -> Any:
    """The member `name` with `settings` for its fields. An unknown name or setting lists the valid ones."""
    member, _ = member_class(family, name)
    path = _members(family)[name]
    is_own = path.parent.parent != home(family)
    if is_own:
        check_class(FAMILIES[family], member, path)
    unknown = sorted(set(settings or {}) - set(member.model_fields))
    if unknown:
        raise UnknownName(f"setting of {singular(family)} {name!r}", unknown[0], list(member.model_fields))
    try:
        made = member(**(settings or {}))
    except ValidationError as error:
        raise ConfigError(f"{family}.{name}: {first_problem(error)}") from error
    except Exception as error:
        if not is_own or isinstance(error, VisionloopError):
            raise
        raise failed(f"{singular(family)} {name!r}", path, "could not be made", error) from error
    return CheckedPlugin(made, FAMILIES[family], name, path) if is_own else made


def member_file(family: str, name: str) -> Path:
    """The file of a member; raises UnknownName."""
    members = _members(family)
    if name not in members:
        raise UnknownName(singular(family), name, list(members))
    return members[name]


def member_digest(family: str, name: str) -> str:
    """sha256 of the member's source and of every module of ours that it imports."""
    return source_digest(member_file(family, name))


def imported(code: CodeType) -> set[str]:
    """Dotted names that a compiled module imports, with what it takes from them; relative imports are left out.

    Of compiled code and not of a syntax tree: Python before 3.11.8 and 3.12.2 fails now and then when several threads make
    trees (python/cpython#106905), and exports are keyed in threads.
    """
    found: set[str] = set()
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    for level, names, step in zip(steps, steps[1:], steps[2:], strict=False):
        if step.opname == "IMPORT_NAME" and level.argval == 0:
            found |= {step.argval, *(f"{step.argval}.{name}" for name in names.argval or ())}
    return found.union(*(imported(constant) for constant in code.co_consts if isinstance(constant, CodeType)))


def _imports(path: Path) -> set[Path]:
    root = _ROOT.parent
    found: set[Path] = set()
    for name in imported(compile(path.read_bytes(), str(path), "exec", dont_inherit=True, optimize=0)):
        if name.split(".")[0] not in ("components", "registry", "monitoring"):
            continue
        base = root.joinpath(*name.split("."))
        found |= {file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()}
    return found


def sources(*paths: Path) -> set[Path]:
    """Modules and, transitively, every module of ours that they import."""
    seen: set[Path] = set()
    queue = list(paths)
    while queue:
        current = queue.pop()
        if current not in seen:
            seen.add(current)
            queue += _imports(current)
    return seen


@functools.cache
def source_digest(path: Path) -> str:
    """sha256 over a module's source and, transitively, every module of ours that it imports.

    Two runs share a cached result only when this is equal: a changed line anywhere in a stage's code makes it anew.
    """
    digest = hashlib.sha256()
    for file in sorted(sources(path), key=lambda p: (p.name, p.as_posix())):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
