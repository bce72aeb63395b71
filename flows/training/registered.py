"""The evidence that a version was registered with, read from MLflow's copy of it and verified against the ledger's row.

A run folder may be gone, or lie on another machine, or have been changed; a person decides on what the row is bound to.
"""

from __future__ import annotations

import functools
import json
import shutil
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.contracts.data import Dataset, Splits
from components.contracts.errors import StoreError, TamperedArtefact
from components.contracts.evidence import CandidateEvidence
from components.contracts.models import Engine
from components.contracts.records import RecordT, Stored
from components.contracts.verdicts import Evaluation, Measurement, Robustness, Verdict
from components.selective import RiskCoverage
from components.store import sha256_file
from flows.workspace.desk import Desk
from registry.approval import State
from registry.models import EVIDENCE, verify_bundle

SHOWN = "shown"
"""Folder of the pictures that a person looks at, beside the records."""
_CHAMPION = "champion"


@dataclass(frozen=True)
class RegisteredEvidence:
    """The records of one version; what older versions did not keep is None or empty."""

    folder: Path
    verdict: Verdict
    engines: tuple[Stored[Engine], ...]
    """The reference first."""
    evaluations: tuple[Stored[Evaluation], ...]
    measurements: tuple[Stored[Measurement], ...]
    champion: Evaluation | None
    shown: CandidateEvidence | None
    robustness: tuple[Robustness, ...]
    champion_robustness: Robustness | None
    risk_coverage: RiskCoverage | None
    dataset: Dataset
    splits: Splits
    history: list[dict[str, float]]

    @property
    def serving(self) -> Evaluation:
        """Of the engine that serves, or of the reference where that one could not run."""
        name = self.verdict.serving_engine
        of_serving = [e.record for e in self.evaluations if e.record.engine == name and e.record.metrics]
        return of_serving[0] if of_serving else self.evaluations[0].record

    @property
    def pictures(self) -> Path:
        """Where the files lie that `shown` names."""
        return self.folder / SHOWN


def registered_evidence(desk: Desk, state: State) -> RegisteredEvidence:
    """What a version was registered with; fetched once, and verified then.

    Raises StoreError where it is away, TamperedArtefact where it was changed, RegistryUnavailable where nobody answers.
    """
    manifest = state.requested.body["manifest_sha256"]
    folder = kept_in(desk, state)
    if not folder.is_dir():
        with _lock_of(manifest):
            if not folder.is_dir():
                scratch = folder.with_name(f".{manifest}.tmp")
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir(parents=True)
                desk.promotion.registry.fetch_evidence(desk.model, state.version, manifest, out=scratch)
                _unpack(scratch / EVIDENCE)
                scratch.rename(folder)
    try:
        return _verified(folder, manifest, _signature(folder / EVIDENCE))
    except (StoreError, ValueError, OSError, KeyError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise TamperedArtefact(
            f"the evidence of version {state.version} in the cache is not what the ledger's row is bound to: it was changed "
            f"after it was fetched ({error}). It was removed; look again, and MLflow's copy is fetched and verified anew"
        ) from error


@functools.lru_cache(maxsize=64)
def _verified(folder: Path, manifest: str, _: tuple[tuple[str, int, int], ...]) -> RegisteredEvidence:
    """The records, after every file was compared with the manifest; again where a time or a size of one changed."""
    verify_bundle(folder, manifest, within=f"{EVIDENCE}/")
    return read(folder / EVIDENCE)


def _signature(folder: Path) -> tuple[tuple[str, int, int], ...]:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return tuple((path.name, status.st_mtime_ns, status.st_size) for path in files for status in (path.stat(),))


@functools.cache
def _lock_of(_: str) -> threading.Lock:
    """One for each manifest: where one is slow to come, others are not waited for."""
    return threading.Lock()


def kept_in(desk: Desk, state: State) -> Path:
    """The folder of the cache that holds a version's evidence, once it was fetched."""
    folder: Path = desk.workspace.cache / "registered" / state.requested.body["manifest_sha256"]
    return folder


def _unpack(folder: Path) -> None:
    """Lay out the pictures; only what the verified record names, with the digests that it gives."""
    record = folder / "shown.json"
    if not record.is_file():
        return
    shown = CandidateEvidence.read(json.loads(record.read_text()))
    out = folder / SHOWN
    out.mkdir()
    with zipfile.ZipFile(folder / "shown.zip") as archive:
        for file in shown.files:
            target = out / file.name
            if not target.resolve().is_relative_to(out.resolve()):
                raise TamperedArtefact(f"the evidence names a file outside of it: {file.name!r}")
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(file.name) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy)
            if sha256_file(target) != file.sha256:
                raise TamperedArtefact(f"{file.name} of the evidence is not the file that its record names")


def read(folder: Path) -> RegisteredEvidence:
    """The records of a folder that was verified when it was fetched."""

    def one(name: str, record: type[RecordT]) -> RecordT | None:
        path = folder / f"{name}.json"
        return record.read(json.loads(path.read_text())) if path.is_file() else None

    def every(kind: str, record: type[RecordT]) -> tuple[Stored[RecordT], ...]:
        found = [Stored(made, folder) for name in names if (made := one(f"{name}.{kind}", record)) is not None]
        return tuple(found)

    verdict, dataset, splits = one("verdict", Verdict), one("dataset", Dataset), one("splits", Splits)
    if verdict is None or dataset is None or splits is None:
        raise TamperedArtefact(f"{folder} lacks a verdict, a data set or splits")
    names = [engine.engine for engine in verdict.engines]
    history: Any = json.loads((folder / "history.json").read_text())
    return RegisteredEvidence(
        folder=folder,
        verdict=verdict,
        engines=every("engine", Engine),
        evaluations=every("evaluation", Evaluation),
        measurements=every("measurement", Measurement),
        champion=one(f"{_CHAMPION}.evaluation", Evaluation),
        shown=one("shown", CandidateEvidence),
        robustness=tuple(stored.record for stored in every("robustness", Robustness)),
        champion_robustness=one(f"{_CHAMPION}.robustness", Robustness),
        risk_coverage=one("risk_coverage", RiskCoverage),
        dataset=dataset,
        splits=splits,
        history=history,
    )
