"""Warm start: a training that goes on from the network of today's champion.

A run keeps the champion that it began from, by the version in its run folder: started again, it finds the same results,
whatever was promoted since. Data that grew make another run, which begins from the champion of its own day.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.contracts.errors import ConfigError
from components.contracts.models import Checkpoint
from components.contracts.records import Stored
from components.store import write_atomically
from components.training import TrainingConfig, expect_same_network
from registry.models import Registry


@dataclass(frozen=True)
class WarmStart:
    """The champion that a training begins from."""

    version: str
    checkpoint: Stored[Checkpoint]

    @property
    def told(self) -> str:
        return f"champion, version {self.version} (weights {self.checkpoint.record.weights.sha256[:16]})"


def warm_start(model: str, config: TrainingConfig, registry: Registry, *, run: Path, cache: Path) -> WarmStart:
    """The champion that the run in the folder `run` begins from, fetched into `cache` and verified.

    Raises ConfigError where the model has none, or one of another network; TamperedArtefact, RegistryUnavailable.
    """
    kept = run / "warm_start.json"
    version = _version(kept)
    if version is None:
        entry = registry.champion(model)
        if entry is None:
            raise ConfigError(
                f"training.weights: champion: {model} has no champion, since none of its versions was promoted yet; train "
                f"from other weights first, and promote what comes of it"
            )
        version = str(entry.body["version"])
    checkpoint = registry.fetch_checkpoint(model, version, out=cache / "champions" / model / "checkpoint")
    expect_same_network(config, checkpoint.record, f"version {version} of {model}, the champion")
    write_atomically(kept, json.dumps({"version": version}).encode())
    return WarmStart(version, checkpoint)


def _version(path: Path) -> str | None:
    try:
        said: Any = json.loads(path.read_text())["version"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return said if isinstance(said, str) else None
