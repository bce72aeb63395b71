"""A workspace's own plug-in against its family's protocol: its class when it is loaded, and every answer where it comes in.

What is wrong with it is told by file and line. Which kinds of answers a family gives is read from the protocols of
`components/contracts/`, so there is nothing to keep in step.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from components.contracts.errors import PluginFailed, VisionloopError, causes, in_short

_CONTRACTS = ("components.contracts.families", "monitoring.verdicts")
"""Modules that hold the protocols, with the records that they speak of. Found by name: an import would put all of them into
the key of every stage that loads a plug-in."""


@dataclass(frozen=True)
class Breach:
    """One thing that a member does against its family's contract."""

    method: str
    """Where it is to be corrected; empty for the class as a whole."""
    message: str


def class_breaches(member: Any, doc: str | None) -> Iterator[Breach]:
    """What is wrong with a member's class; `doc` is its module's docstring."""
    if not member.model_config.get("frozen") or member.model_config.get("extra") != "forbid":
        yield Breach(
            "", "its settings can be changed or misspelt; set model_config = ConfigDict(frozen=True, extra='forbid')"
        )
    if not (doc and doc.strip()) or not (member.__doc__ and member.__doc__.strip()):
        yield Breach("", "its file and its class each need a docstring that says what it does")


def place_of(error: BaseException, folder: Path) -> str | None:
    """`file:line` below `folder` that an error came from; None when none of its frames lies there."""
    for link in causes(error):
        files = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(link.__traceback__)]
        files += [(link.filename or "", link.lineno)] if isinstance(link, SyntaxError) else []
        for file, line in reversed(files):
            if Path(file).is_relative_to(folder):
                return f"{file}:{line}"
    return None


def failed(member: str, path: Path, what: str, error: BaseException) -> PluginFailed:
    """What a person's own code raised, as an error that names its line."""
    place = place_of(error, path.parent.parent) or str(path)
    return PluginFailed(f"{member} {what}: {place}: {in_short(error)}; correct it there")


def check_class(kind: str, member: Any, path: Path) -> None:
    """Raise PluginFailed unless a class is a pydantic model that can be called as the protocol `kind` is."""
    if not (isinstance(member, type) and issubclass(member, BaseModel)):
        what = "a plain class" if isinstance(member, type) else f"a {type(member).__name__}, no class"
        raise PluginFailed(
            f"{path}: {kind} is {what}; make it a pydantic model whose fields are its settings: "
            f"`class {kind}(BaseModel)` with `model_config = ConfigDict(frozen=True, extra='forbid')`"
        )
    for name, expected in _contract(kind).items():
        found = getattr(member, name, None)
        if isinstance(expected, property):
            if found is None and name not in member.model_fields:
                raise PluginFailed(f"{path}: {kind} has no {name}; its family needs the property `{name}`")
            continue
        wanted = inspect.signature(expected)
        spelled = f"`def {name}{wanted}`".replace("'", "")
        if not callable(found):
            raise PluginFailed(f"{path}: {kind} has no method {name}; its family needs {spelled}")
        parameters = list(wanted.parameters.values())
        bound = isinstance(inspect.getattr_static(member, name), (staticmethod, classmethod))
        positional = [None for p in parameters[bound:] if p.kind is p.POSITIONAL_OR_KEYWORD]
        named = {p.name: None for p in parameters if p.kind is p.KEYWORD_ONLY}
        try:
            inspect.signature(found).bind(*positional, **named)
        except TypeError as error:
            raise PluginFailed(f"{path}: {kind}.{name} does not take what it is given ({error}); write {spelled}") from error


def _contract(kind: str) -> Mapping[str, Any]:
    """The public methods and properties of a protocol."""
    return {name: part for name, part in vars(_known(kind)).items() if not name.startswith("_")}


@functools.cache
def _known(name: str) -> Any:
    """A class of the contracts by its name, such as `Issue` or `verdicts.Finding`; None for none of ours.

    Looked up once: where MLflow loaded a version with its own source, that cannot be imported any more when it answers.
    """
    for home in _CONTRACTS:
        found: Any = importlib.import_module(home)
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return found
    return None


_OPTIONAL = {"blocks": "list"}
"""What a member may answer beside its family's protocol, and of which kind that is."""


class CheckedPlugin:
    """A workspace's own member: what it raises names its line, and what it answers is of its family's kind."""

    def __init__(self, member: Any, kind: str, name: str, path: Path) -> None:
        self._member, self._kind, self._path = member, kind, path
        self._told = f"{kind.lower()} {name!r}"

    def __getattr__(self, name: str) -> Any:
        expected = _contract(self._kind).get(name)
        if expected is None and name not in _OPTIONAL:
            return getattr(self._member, name)
        if isinstance(expected, property):
            return self.answer(name, _returned(expected.fget), lambda: getattr(self._member, name))
        method = getattr(self._member, name)
        annotation = _OPTIONAL[name] if expected is None else _returned(expected)
        return lambda *given, **named: self.answer(name, annotation, lambda: method(*given, **named))

    def answer(self, method: str, annotation: str, ask: Callable[[], Any]) -> Any:
        """What the member answers; raises PluginFailed when it raises, or answers something else."""
        try:
            answer = ask()
        except VisionloopError:
            raise
        except Exception as error:
            raise failed(self._told, self._path, f"raised in {method}", error) from error
        if not _is(answer, annotation):
            refused = PluginFailed(
                f"{self._told}: {method} answered {_shown(answer)}, expected {annotation}; correct it in {self._path}"
            )
            refused.method = method
            raise refused
        return _CheckedPredictor(answer, self) if annotation == "Predictor" else answer


class _CheckedPredictor:
    """The Predictor of a workspace's own target."""

    def __init__(self, predictor: Any, target: CheckedPlugin) -> None:
        self._predictor, self._target = predictor, target

    def predict(self, images: Any) -> Any:
        """See `Predictor.predict`."""
        return self._target.answer("predict", f"two arrays of {len(images)} rows", lambda: self._predictor.predict(images))


def _returned(method: Any) -> str:
    annotation: str = method.__annotations__["return"]
    return annotation


_KINDS: Mapping[str, Any] = {
    "str": str,
    "int": int,
    "tuple": tuple,
    "list": list,
    "dict": dict,
    "Mapping": Mapping,
    "frozenset": frozenset,
}


def _is(answer: Any, annotation: str) -> bool:
    """Whether an answer is what an annotation says, as far as can be told without importing a library for it."""
    kind, _, inside = annotation.partition("[")
    if kind == "None":
        return True
    if kind == "Predictor":
        return callable(getattr(answer, "predict", None))
    if kind.startswith("two arrays of "):
        rows = int(kind.split()[3])
        pair = isinstance(answer, (tuple, list)) and len(answer) == 2
        return pair and all(getattr(array, "ndim", 0) == 2 and len(array) == rows for array in answer)
    if kind == "bool":
        return isinstance(answer, bool)
    if kind == "tuple" and "torch.Tensor" in inside:
        wanted = inside.removesuffix("]").split(", ")
        whole = isinstance(answer, tuple) and len(answer) == len(wanted)
        return whole and all(_is(part, each) for part, each in zip(answer, wanted, strict=True))
    if kind == "float":
        number = hasattr(answer, "__float__") and not isinstance(answer, (bool, str)) and getattr(answer, "ndim", 0) == 0
        return number and math.isfinite(float(answer))
    if kind.startswith(("torch.", "npt.")):
        library = sys.modules.get("torch" if kind.startswith("torch.") else "numpy")
        name = {"torch.nn.Module": "nn.Module", "torch.Tensor": "Tensor", "npt.NDArray": "ndarray"}[kind]
        for part in name.split("."):
            library = getattr(library, part, None)
        return library is None or isinstance(answer, library)  # type: ignore[arg-type]
    if isinstance(answer, bool) or not isinstance(answer, _KINDS.get(kind) or _known(kind)):
        return False
    # Values that are records of ours, as in dict[str, Estimate].
    named = [_known(name) for name in re.findall(r"\b[A-Z]\w+", inside)]
    records = tuple(found for found in named if isinstance(found, type) and found is not Any)
    values = answer.values() if isinstance(answer, Mapping) else answer
    return not records or all(isinstance(value, records) for value in values)


def _shown(answer: Any) -> str:
    return "nothing (None)" if answer is None else f"{repr(answer)[:60]} ({type(answer).__name__})"
