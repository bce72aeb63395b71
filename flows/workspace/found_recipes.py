"""Recipes that a command writes: anew as long as nobody changed them, and never over a person's work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from components.contracts.errors import ConfigError
from components.contracts.records import sha256_text
from components.store import write_atomically
from flows.workspace.recipes import SUFFIXES, expect_plain_name
from flows.workspace.yaml_reading import parse_yaml


@dataclass(frozen=True)
class Writer:
    """What writes a recipe, which a section of the recipe names."""

    command: str
    """Such as `tune`."""
    section: str
    key: str
    """Of the section, and what stands there in the files that are this writer's."""
    value: str
    told: str
    """The same in words, such as `study 'x'`."""

    @property
    def head(self) -> str:
        return (
            f"# Found by `visionloop {self.command}`, which writes this file anew as long as nobody changes it. "
            f"sha256 of what follows: "
        )

    def expect_free(self, root: Path, name: str) -> None:
        """Raise ConfigError where the recipe cannot be written: a wrong name, or a file that is not this writer's own."""
        expect_plain_name(name)
        if name.endswith(SUFFIXES):
            raise ConfigError(f"--write {name!r} ends like a file; give the recipe's name alone: {Path(name).stem!r}")
        path = _path(root, name)
        for other in (path.with_suffix(".yml"), path):
            if (other.exists() or other.is_symlink()) and not (other == path and self._wrote(path)):
                raise ConfigError(
                    f"{other} is there already and is not what {self.told} wrote into it, so it is left as it is; move it "
                    f"away, or name another recipe for the winner: --write NAME"
                )

    def write(self, root: Path, name: str, values: Mapping[str, Any]) -> Path:
        """Write the recipe; raises ConfigError where the file is not this writer's."""
        self.expect_free(root, name)
        body = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=120)
        path = _path(root, name)
        path.parent.mkdir(exist_ok=True)
        text = f"{self.head}{sha256_text(body)}\n{body}"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_atomically(path, text.encode())
        return path

    def _wrote(self, path: Path) -> bool:
        """Whether a file is as this writer left it."""
        try:
            head, _, body = path.read_text(encoding="utf-8").partition("\n")
        except (OSError, UnicodeDecodeError):
            return False
        if path.is_symlink() or head != f"{self.head}{sha256_text(body)}":
            return False
        values = parse_yaml(body, str(path))
        return isinstance(values, dict) and (values.get(self.section) or {}).get(self.key) == self.value


def _path(root: Path, name: str) -> Path:
    return root / "recipes" / f"{name}.yaml"
