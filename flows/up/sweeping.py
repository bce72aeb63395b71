"""Sweeping all models of a workspace: what should train and does not is started, and one model's fault stops no other."""

from __future__ import annotations

from dataclasses import dataclass

from components.contracts.errors import ConfigError
from flows.loop.alarms import sweep
from flows.loop.flow_runs import Started
from flows.loop.loop import Loop
from flows.loop.windows import open_loop
from flows.up.processes import Up
from flows.up.stack import models_of
from flows.workspace.settings import read_settings
from flows.workspace.workspace import Workspace


@dataclass(frozen=True)
class Swept:
    """What a sweep started."""

    models: tuple[str, ...]
    started: tuple[tuple[str, Started], ...]
    """Each with its model."""
    notes: tuple[str, ...]
    """Why something was not started now; the next sweep tries again."""
    problems: tuple[str, ...]
    """Models whose loop or recipe is not valid."""


def sweep_models(workspace: Workspace, model: str | None) -> Swept:
    """Start what nobody started, of one model of the ledger or of all. Raises what `open_loop` does."""
    settings = read_settings(workspace.state)
    if model:
        loops = [open_loop(workspace.root, model)]
    else:
        loops = [Loop(workspace, settings, name) for name in models_of(Up(workspace, settings), [])]
    started: list[tuple[str, Started]] = []
    notes: list[str] = []
    problems: list[str] = []
    for loop in loops:
        try:
            _ = loop.config  # one that is not valid is told before its first alarm
            started += [(loop.model, found) for found in sweep(loop, say=notes.append, grace_s=0)]
        except ConfigError as error:
            problems.append(f"{loop.model}: {error}")
    return Swept(tuple(loop.model for loop in loops), tuple(started), tuple(notes), tuple(problems))
