"""The demo's scratch workspace: the committed data.dvc and test ledger, filled from the embedded digits, and its loop."""

from __future__ import annotations

from pathlib import Path

from components import git
from components.companions import PIN, TEST_LEDGER
from components.contracts.errors import ConfigError, DataError
from components.store import write_atomically
from flows.loop.loop import LOOPS
from flows.workspace.workspace import Workspace

_REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = "digits"
LOOP = """# The demo's loop: windows are looked at when it asks, and a person labels 300 images.
recipe: digits
every_minutes: 720
look_back: 1
to_label: 300
"""
_IDENTITY = {"user.name": "visionloop demo", "user.email": "demo@visionloop.invalid", "commit.gpgsign": "false"}


def prepare(directory: Path) -> Workspace:
    """Make or reopen the scratch workspace; what it pins first has to be what the repository's data.dvc says."""
    pins = [_REPOSITORY / name for name in (PIN, TEST_LEDGER)]
    missing = [pin for pin in pins if not pin.is_file()]
    if missing:
        raise ConfigError(f"{missing[0]} is missing: the demo runs from a clone of the repository")
    if directory.exists() and not (directory / ".dvc").is_dir() and any(directory.iterdir()):
        raise ConfigError(f"{directory} is not empty and not a workspace; name another with --directory")
    workspace = Workspace.create(directory, own_repository=True)
    with workspace.locked("visionloop demo"):
        if git.state(workspace.root)[0] == "none":
            for pin in pins:
                write_atomically(workspace.root / pin.name, pin.read_bytes())
            (workspace.root / LOOPS).mkdir(exist_ok=True)
            write_atomically(workspace.root / LOOPS / f"{MODEL}.yaml", LOOP.encode())
            ignore = workspace.root / ".gitignore"
            write_atomically(ignore, ignore.read_bytes() + b"/report.html\n")
            git.stage(workspace.root, ".gitignore", *(pin.name for pin in pins), f"{LOOPS}/{MODEL}.yaml")
            commit(workspace, "Pin the embedded digits")
        else:
            _expect_ours(workspace, pins)
    return workspace


def _expect_ours(workspace: Workspace, pins: list[Path]) -> None:
    """The demo's own history begins with the repository's pins; its later versions are the loop's."""
    root = workspace.root
    first = git.run(root, "rev-list", "--max-parents=0", "HEAD").splitlines()[-1]
    for pin in pins:
        try:
            began = git.run(root, "show", f"{first}:{pin.name}")
        except DataError:
            began = ""
        if began.strip() != pin.read_text(encoding="utf-8").strip():
            raise ConfigError(
                f"{root} began with other data than this demo's; remove it, or name another folder with --directory"
            )


def commit(workspace: Workspace, message: str) -> None:
    """Commit what is staged, as the demo."""
    options = [part for name, value in _IDENTITY.items() for part in ("-c", f"{name}={value}")]
    git.run(workspace.root, *options, "commit", "--quiet", "-m", message)
