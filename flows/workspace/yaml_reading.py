"""YAML that people write: recipes, loops and the values of --set, read in one way.

Plain values mean what YAML 1.2 says: `1e-3` is a number, and `no`, `12:30` and `2026-01-01` are text. A key is text as it is
written. A key that is there twice, a tag, and aliases that multiply are refused, with the line.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from components.contracts.errors import ConfigError

_MOST_BYTES = 1 << 20
_MOST_VALUES = 100_000
"""Values of a file with every alias written out: a few aliases of aliases are millions."""
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: Any = {}

    def compose_document(self) -> Any:
        node = super().compose_document()
        _values(node, {})
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}

    def flatten_mapping(self, node: Any) -> None:
        """Merge what `<<` names, once no key of the mapping itself is there twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refused("a key has to be plain text", key)
            if key.value in seen:
                raise _refused(f"key {key.value!r} is there twice", key)
            seen.add(key.value)
        super().flatten_mapping(node)


def _whole(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


def _fraction(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    """A float; a whole one that is written with an exponent, such as 1e3, is an int: it fits where either is expected."""
    text = loader.construct_scalar(node).lower().replace("_", "")
    value = float(text.replace(".inf", "inf").replace(".nan", "nan"))
    return int(value) if "." not in text and value.is_integer() and abs(value) < 2**53 else value


_Loader.add_constructor("tag:yaml.org,2002:int", _whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _fraction)
for _tag, _pattern, _first in (
    ("merge", r"<<", "<"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    # Not 0123: it is 83 to some readers and 123 to others.
    ("int", r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:(?:0|[1-9][0-9]*(?:_[0-9]+)*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), ["" if c == "\0" else c for c in _first]
    )


def _refused(problem: str, node: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _values(node: Any, sizes: dict[int, int]) -> int:
    """How many values a node is with its aliases written out; raises for tags, circles and too many."""
    if id(node) in sizes:
        if sizes[id(node)] < 0:
            raise _refused("an alias stands within what it names", node)
        return sizes[id(node)]
    if node is None:
        return 0
    if node.tag not in _TAGS:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise _refused(f"the tag {tag} is not read; write the value plainly", node)
    sizes[id(node)] = -1
    children: list[Any] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    size = 1 + sum(_values(child, sizes) for child in children)
    if size > _MOST_VALUES:
        raise _refused(f"it comes to more than {_MOST_VALUES:,} values", node)
    sizes[id(node)] = size
    return size


def read_mapping(path: Path, what: str, *, may_be_empty: bool = False) -> dict[str, Any]:
    """The mapping that a file holds; `what` names the file's kind in errors. Raises ConfigError with the line."""
    values = parse_yaml(_read(path, what), f"{what} {path}")
    if values is None and may_be_empty:
        return {}
    if values is None:
        raise ConfigError(f"{what} {path} is empty; expected a mapping, lines such as `key: value`")
    if not isinstance(values, dict):
        raise ConfigError(f"{what} {path} is not a mapping, lines such as `key: value`; it holds {_kind(values)}")
    return values


def with_values(path: Path, values: Mapping[str, str], what: str) -> str:
    """A file's text with other values for some of its first-level keys, everything else and every comment as it was.

    Raises ConfigError where a value cannot be replaced by itself, such as one that is aliased elsewhere.
    """
    expected = {**read_mapping(path, what), **values}
    text = _read(path, what)
    root: Any = _Loader(text).get_single_node()
    nodes = [(node, values[key.value]) for key, node in root.value if key.value in values]
    # From the end, so that the places before stay where they are.
    for node, value in sorted(nodes, key=lambda found: found[0].start_mark.index, reverse=True):
        written = value if parse_yaml(value, what) == value else json.dumps(value)
        text = text[: node.start_mark.index] + written + text[node.end_mark.index :]
    with contextlib.suppress(ConfigError):
        if parse_yaml(text, what) == expected:
            return text
    names = " and ".join(values)
    raise ConfigError(f"{what} {path} cannot be copied: write its {names} plainly, as `key: value` on a line each")


def parse_settings(pairs: Sequence[str], option: str) -> dict[str, Any]:
    """The settings that `key=value` texts give; raises ConfigError that names the option."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ConfigError(f"{option} {pair!r} is not of the form key=value, such as dataset=CIFAR10")
        settings[key] = parse_yaml(value, f"the value of {option} {pair!r}")
    return settings


def parse_yaml(text: str, place: str) -> Any:
    """The value of a YAML text; raises ConfigError that names the place and the line."""
    try:
        return _Loader(text).get_single_data()
    except RecursionError:
        raise ConfigError(f"{place} is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark is not None else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        hint = "; indent with spaces, not with tabs" if "'\\t'" in problem else ""
        raise ConfigError(f"{place} is not valid YAML{line}: {problem}{hint}") from error


def _read(path: Path, what: str) -> str:
    try:
        if not path.is_file() and path.exists():
            raise ConfigError(f"cannot read {what} {path}: it is not a file")
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {what} {path}: {error.strerror}") from error
    if len(data) > _MOST_BYTES:
        raise ConfigError(f"{what} {path} is larger than 1 MiB; this is not a {what}")
    return _text(data, f"{what} {path}")


def _text(data: bytes, place: str) -> str:
    """UTF-8 with or without a mark, or UTF-16 with one."""
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{place} is not UTF-8 text: byte 0x{data[error.start]:02x} in line {line}; save it as UTF-8"
        ) from error


def _kind(value: object) -> str:
    return "a list" if isinstance(value, list) else f"the single value {str(value)[:40]!r}"
