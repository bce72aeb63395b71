"""The artefacts of a workspace against their digests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from components.contracts.errors import TamperedArtefact
from components.store import read_manifest
from flows.workspace.workspace import Workspace


@dataclass(frozen=True)
class BrokenArtefact:
    """A published folder that is not what its manifest says."""

    folder: Path
    problem: str
    moved_to: Path | None
    """Where it was set aside; None where it still lies in the store."""


@dataclass(frozen=True)
class StoreVerified:
    """What a look at every artefact found."""

    intact: int
    broken: tuple[BrokenArtefact, ...]


def verify_store(workspace: Workspace, *, discard: bool) -> StoreVerified:
    """Check every published artefact; what does not verify is set aside with `discard`, so that a run makes it anew."""
    store, broken, intact = workspace.store, [], 0
    for folder in store.artefacts():
        try:
            read_manifest(folder)
            intact += 1
        except TamperedArtefact as error:
            broken.append(BrokenArtefact(folder, str(error), store.discard(folder) if discard else None))
    return StoreVerified(intact, tuple(broken))
