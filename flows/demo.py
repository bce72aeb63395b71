"""The demo's scratch workspace: the committed data.dvc and test ledger, filled from the embedded digits."""

from __future__ import annotations

import shutil
from pathlib import Path

from components import dataversions
from components.contracts import ConfigError
from flows.run import Workspace

_REPOSITORY = Path(__file__).resolve().parent.parent


def prepare(directory: Path) -> Workspace:
    """Make or reopen the scratch workspace; its data have to hash to what the repository's data.dvc says."""
    pins = [_REPOSITORY / name for name in (dataversions.PIN, dataversions.TEST_LEDGER)]
    missing = [pin for pin in pins if not pin.is_file()]
    if missing:
        raise ConfigError(f"{missing[0]} is missing: the demo runs from a clone of the repository")
    if directory.exists() and not (directory / ".dvc").is_dir() and any(directory.iterdir()):
        raise ConfigError(f"{directory} is not empty and not a workspace; name another with --directory")
    workspace = Workspace.create(directory)
    for pin in pins:
        shutil.copyfile(pin, workspace.root / pin.name)
    dataversions.git(workspace.root, "add", *(pin.name for pin in pins))
    if dataversions.git(workspace.root, "status", "--porcelain", "--untracked-files=no"):
        identity = ["-c", "user.name=visionloop demo", "-c", "user.email=demo@visionloop.invalid"]
        dataversions.git(workspace.root, *identity, "commit", "--quiet", "-m", "Pin the embedded digits")
    return workspace
