"""Opening a run: recipe, workspace, lock and data are checked before any stage starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from components.contracts import counted
from flows.config import load_recipe
from flows.console import Console
from flows.data import ensure
from flows.run import STAGES, Run, Workspace
from flows.settings import read_settings


@contextmanager
def opened(
    recipe: str, folder: Path, overrides: Sequence[str], reason: str, *, requested_by: str, quiet: bool
) -> Iterator[Run]:
    """A run whose recipe is valid, whose data are the pinned ones and whose workspace is held."""
    workspace = Workspace.find(folder)
    config = load_recipe(recipe, overrides, workspace=workspace.root)
    settings = read_settings(workspace.state)
    with workspace.locked(f"visionloop train {recipe}"), Console(len(STAGES), quiet=quiet) as console:
        data = ensure(workspace, config.source)
        run = Run(workspace, config, data, settings, console, requested_by=requested_by, reason=reason, overrides=overrides)
        console.line(
            f"run {run.id}: recipe {config.name}, {counted(data.num_files, 'file')} of data version {data.dvc_hash[:12]} "
            f"({reason})"
        )
        for name, why in run.absent.items():
            console.line(f"    {name}: {why}")
        yield run
