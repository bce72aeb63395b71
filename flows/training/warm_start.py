"""Warm start: a training that goes on from the network of today's champion.

A run whose training is done keeps the champion that it began from, by a file in its run folder: started again, it finds the
same results, whatever was promoted since. Data that grew make another run, which begins from the champion of its own day.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from components.contracts.data import DataVersion, Renames
from components.contracts.errors import ConfigError, TamperedArtefact
from components.contracts.models import Checkpoint
from components.contracts.records import Stored
from components.store import seal, unseal, write_atomically
from components.training import TrainingConfig, expect_same_network
from registry.models import Registry


@dataclass(frozen=True)
class WarmStart:
    """The champion that a training begins from."""

    version: str
    weights: str
    """Their sha256."""
    fetch: Callable[[], Stored[Checkpoint]]
    """The verified checkpoint; asked only when there is something to train."""
    renamed: Renames = ()
    """The classes that got other names since it was trained."""

    @property
    def told(self) -> str:
        return f"champion, version {self.version} (weights {self.weights[:16]})"


def warm_start(
    model: str, config: TrainingConfig, data: DataVersion, registry: Registry, *, run: Path, cache: Path
) -> WarmStart:
    """The champion that the run on `data` in the folder `run` begins from, or began from; `cache` takes its checkpoint.

    Raises ConfigError where the model has none, or one of another network; TamperedArtefact, RegistryUnavailable.
    """
    kept = _file(run)

    def fetch(version: str) -> tuple[Stored[Checkpoint], DataVersion]:
        return registry.fetch_checkpoint(model, version, out=cache / "champions" / model / "checkpoint")

    if kept.exists():
        body = unseal(kept.read_bytes())
        if body is None:
            raise TamperedArtefact(f"{kept} was changed after it was written; remove it to go on from today's champion")
        # Files of before classes could get other names say nothing of them.
        renamed = tuple((old, new) for old, new in body.get("renamed", ()))
        return WarmStart(body["version"], body["weights"], lambda: fetch(body["version"])[0], renamed)
    entry = registry.champion(model)
    if entry is None:
        raise ConfigError(
            f"training.weights: champion: {model} has no champion, since none of its versions was promoted yet; train "
            f"from other weights first, and promote what comes of it"
        )
    version = str(entry.body["version"])
    checkpoint, its_data = fetch(version)
    expect_same_network(config, checkpoint.record, f"version {version} of {model}, the champion")
    return WarmStart(version, checkpoint.record.weights.sha256, lambda: checkpoint, data.renames_since(its_data))


def keep(start: WarmStart, run: Path) -> None:
    """Let the run in this folder begin from this champion whenever it is started again."""
    if not _file(run).exists():
        said = {"version": start.version, "weights": start.weights, "renamed": [list(one) for one in start.renamed]}
        write_atomically(_file(run), seal(said))


def _file(run: Path) -> Path:
    return run / "warm_start.json"
