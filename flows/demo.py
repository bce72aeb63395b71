"""The demo's scratch workspace: the committed data.dvc and test ledger, filled from the embedded digits."""

from __future__ import annotations

from pathlib import Path

from components import dataversions
from components.contracts import ConfigError
from components.store import write_atomically
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
    with workspace.locked("visionloop demo"):
        for pin in pins:
            own = workspace.root / pin.name
            if own.exists() and own.read_bytes() != pin.read_bytes():
                raise ConfigError(f"{own} pins other data than the demo's; name another folder with --directory")
            write_atomically(own, pin.read_bytes())
        dataversions.git(workspace.root, "add", *(pin.name for pin in pins))
        if dataversions.git_state(workspace.root)[0] == "none":
            settings = {"user.name": "visionloop demo", "user.email": "demo@visionloop.invalid", "commit.gpgsign": "false"}
            options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
            dataversions.git(workspace.root, *options, "commit", "--quiet", "-m", "Pin the embedded digits")
    return workspace
