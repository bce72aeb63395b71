"""What the digest of a member covers."""

from __future__ import annotations

import ast
from pathlib import Path

from components import plugins

REPOSITORY = Path(__file__).resolve().parents[2]


def test_imports_of_compiled_code_are_those_of_its_text() -> None:
    found = 0
    for package in ("components", "flows", "monitoring", "registry", "serving"):
        for path in (REPOSITORY / package).rglob("*.py"):
            text, expected = path.read_bytes(), set[str]()
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                    expected |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
                elif isinstance(node, ast.Import):
                    expected |= {alias.name for alias in node.names}
            assert plugins.imported(compile(text, str(path), "exec", dont_inherit=True, optimize=0)) == expected, path
            found += len(expected)
    assert found > 500
