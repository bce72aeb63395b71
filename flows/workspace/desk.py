"""Opening a workspace's registry, and telling which model is meant when nobody names one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from components.contracts.errors import ConfigError, UnknownName
from components.releases import ReleaseStore
from flows.terminal import to_stderr
from flows.workspace.settings import Settings, read_settings
from flows.workspace.workspace import Workspace
from registry import tracking
from registry.ledger import FollowedLedger, Ledger
from registry.models import Registry
from registry.promotion import Promotion


def artifacts_of(workspace: Workspace, settings: Settings) -> Path | None:
    """Where MLflow keeps files when no server decides that; a workspace that was moved or copied is told so once."""
    if not settings.tracking_is_local:
        return None
    artifacts = workspace.state / "mlflow-artifacts"
    if moved := tracking.settle(settings.tracking_uri, artifacts):
        to_stderr(f"Note: {moved}")
    return artifacts


def registry_of(workspace: Workspace, settings: Settings) -> Registry:
    """The registry of a workspace: MLflow and the ledger."""
    return Registry(settings.tracking_uri, Ledger(settings.ledger_url), artifacts=artifacts_of(workspace, settings))


@dataclass(frozen=True)
class Desk:
    """A workspace's registry, for one model. What needs MLflow is made when it is asked for."""

    workspace: Workspace
    settings: Settings
    ledger: Ledger
    model: str

    @property
    def promotion(self) -> Promotion:
        registry = registry_of(self.workspace, self.settings)
        return Promotion(registry, ReleaseStore(self.settings.releases_url), self.model)


def whole_ledger(settings: Settings) -> Ledger:
    """The ledger for a process that decides: every row is verified whenever it is read."""
    return Ledger(settings.ledger_url)


def followed_ledger(settings: Settings) -> FollowedLedger:
    """The ledger for a process that reads it often."""
    return FollowedLedger(settings.ledger_url)


def desk(folder: Path, model: str | None, ledger: Ledger | None = None) -> Desk:
    """The registry of the workspace at `folder`, on a ledger that the caller has opened, or on one of its own.

    Raises ConfigError when it knows several models and none is named.
    """
    workspace = Workspace.find(folder)
    settings = read_settings(workspace.state)
    ledger = ledger or Ledger(settings.ledger_url)
    known = sorted({entry.model for entry in ledger.entries()})
    if model is None:
        if len(known) != 1:
            if not known:
                raise ConfigError("no model is registered in this workspace; train one: visionloop train --recipe NAME")
            raise ConfigError(f"there are {len(known)} models; name one with --model: {', '.join(known)}")
        model = known[0]
    elif model not in known:
        raise UnknownName("model", model, known)
    return Desk(workspace, settings, ledger, model)
