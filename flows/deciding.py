"""Opening the registry for a decision, and telling who is meant when nobody says which model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from components.contracts import ConfigError, UnknownName
from components.releases import ReleaseStore
from flows.run import Workspace
from flows.settings import Settings, read_settings
from registry.ledger import Ledger
from registry.models import Registry
from registry.promotion import Promotion


@dataclass(frozen=True)
class Desk:
    """A workspace's registry, for one model. What needs MLflow is made when it is asked for."""

    workspace: Workspace
    settings: Settings
    ledger: Ledger
    model: str

    @property
    def promotion(self) -> Promotion:
        artifacts = self.workspace.state / "mlflow-artifacts" if self.settings.tracking_is_local else None
        registry = Registry(self.settings.tracking_uri, self.ledger, artifacts=artifacts)
        return Promotion(registry, ReleaseStore(self.settings.releases_url), self.model)


def desk(folder: Path, model: str | None) -> Desk:
    """The registry of the workspace at `folder`; raises ConfigError when it knows several models and none is named."""
    workspace = Workspace.find(folder)
    settings = read_settings(workspace.state)
    ledger = Ledger(settings.ledger_url)
    known = sorted({entry.model for entry in ledger.entries()})
    if model is None:
        if len(known) != 1:
            hint = (
                f"name one with --model: {', '.join(known)}" if known else "train one first: visionloop train --recipe NAME"
            )
            raise ConfigError(f"the ledger knows {len(known)} models; {hint}")
        model = known[0]
    elif model not in known:
        raise UnknownName("model", model, known)
    return Desk(workspace, settings, ledger, model)
