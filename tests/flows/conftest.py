"""What the tests of the flows share: one champion, promoted once, and copies of its workspace."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from looped import promoted


@pytest.fixture(scope="session")
def champions(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a champion; copy it, never use it."""
    return promoted(trained, tmp_path_factory.mktemp("champions") / "workspace")


@pytest.fixture
def root(champions: Path, tmp_path: Path) -> Path:
    """A workspace with a champion, of one's own."""
    return Path(shutil.copytree(champions, tmp_path / "workspace", symlinks=True))
