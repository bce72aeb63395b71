"""What an edit makes anew: a stage's key covers its own source and what it imports, and nothing beside that."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from components import plugins

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the code that may be touched, as `plugins` sees it."""
    for package in ("components", "monitoring", "registry"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(plugins, "_ROOT", tmp_path / "components")
    return tmp_path


def digest_after(copied: Path, stage: str, touched: str) -> tuple[str, str]:
    """The source digest of a stage before and after a line is added to a file."""
    file = copied / "components" / f"{stage}.py"
    plugins.source_digest.cache_clear()
    before = plugins.source_digest(file)
    with (copied / touched).open("a") as source:
        source.write("\n# touched\n")
    plugins.source_digest.cache_clear()
    return before, plugins.source_digest(file)


@pytest.mark.parametrize(
    "touched",
    [
        "components/contracts/releases.py",
        "components/predictionlog.py",
        "components/journals.py",
        "components/packaging.py",
        "monitoring/verdicts.py",
        "monitoring/drift.py",
        "registry/ledger.py",
    ],
)
@pytest.mark.parametrize("stage", ["validation", "splitting", "training"])
def test_what_serves_or_watches_makes_no_training_anew(copied: Path, stage: str, touched: str) -> None:
    before, after = digest_after(copied, stage, touched)
    assert before == after


@pytest.mark.parametrize("touched", ["components/fitting.py", "components/contracts/models.py", "components/images.py"])
def test_what_training_uses_makes_it_anew(copied: Path, touched: str) -> None:
    before, after = digest_after(copied, "training", touched)
    assert before != after
