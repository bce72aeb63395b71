"""What nothing reaches any more in a workspace, and removing it: run folders, artefacts, work in progress and caches.

Reached are the last runs, the runs and artefacts that a row of the ledger names, engines that were built of registered
versions, the best training of every study, the variants of every choice, what was made of the pinned data, and whatever
those were made from. A cache, or the work that a killed run left to be taken up, is reached when it was used since the first
of the last runs started.
Releases, models in MLflow, predictions and data are never touched.
"""

from __future__ import annotations

import datetime
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from components import dataversions
from components.companions import PIN
from components.contracts.errors import ConfigError
from components.contracts.records import canonical_json, sha256_text
from components.segments import CacheFolder, cache_folders
from components.store import MANIFEST, unseal
from flows.training.past_runs import past_runs
from flows.workspace.judged_engines import FURTHER
from flows.workspace.settings import read_settings
from flows.workspace.workspace import Workspace
from registry.ledger import Ledger

Kind = Literal["run", "artefact", "unfinished", "set aside", "cache"]
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Unreached:
    """A folder that nothing reaches."""

    kind: Kind
    folder: Path
    bytes: int


@dataclass(frozen=True)
class Collected:
    """What was removed, or would be."""

    unreached: tuple[Unreached, ...]
    before_bytes: int
    """Of run folders, store and caches."""
    kept_runs: tuple[str, ...]
    dry_run: bool

    @property
    def freed_bytes(self) -> int:
        return sum(each.bytes for each in self.unreached)

    @property
    def after_bytes(self) -> int:
        """What stays."""
        return self.before_bytes - self.freed_bytes


def collect(workspace: Workspace, *, keep_runs: int, dry_run: bool) -> Collected:
    """Remove what nothing reaches, with `dry_run` only tell it; the last `keep_runs` runs stay.

    Raises ConfigError, WorkspaceBusy beside a run, TamperedArtefact or RegistryUnavailable where the ledger cannot be read.
    """
    if keep_runs < 1:
        raise ConfigError(f"--keep-runs is {keep_runs}; expected at least 1, the run that the next one goes on from")
    with workspace.locked("visionloop store gc"):
        store, caches = workspace.store, cache_folders(workspace.cache)
        names = _named(workspace)
        runs = past_runs(workspace)
        since = min((_seconds(run["started"]) for run in runs[-keep_runs:]), default=0.0)
        folders = [path for path in workspace.runs.glob("*") if path.is_dir()]
        kept = {run["run"] for run in runs[-keep_runs:]} | {path.name for path in folders if path.name in names}
        unreached = [_unreached("run", path) for path in folders if path.name not in kept]
        others = [workspace.state / FURTHER, workspace.studies, workspace.choices]
        linking = [*(workspace.runs / name for name in kept), *others]
        reached = _reached(workspace, linking, names)
        unreached += [_unreached("artefact", path) for path in store.artefacts() if path.resolve() not in reached]
        partial = store.root / ".partial"
        unreached += [_unreached("unfinished", path) for path in partial.glob("*") if _last_change(path) < since]
        unreached += [_unreached("set aside", path) for path in (store.root / ".discarded").glob("*")]
        idle = [cache for cache in caches if cache.used_at < since]
        unreached += [Unreached("cache", cache.folder, cache.bytes) for cache in idle]
        before = sum(_size(place) for place in (workspace.runs, store.root)) + sum(cache.bytes for cache in caches)
        if not dry_run:
            _remove(workspace, unreached, idle)
    ordered = sorted(unreached, key=lambda each: (each.kind, each.folder))
    return Collected(tuple(ordered), before, tuple(sorted(kept)), dry_run)


def _named(workspace: Workspace) -> set[str]:
    """Digests and runs that any row of the ledger names."""
    ledger = Ledger(read_settings(workspace.state).ledger_url)
    try:
        entries = ledger.entries()
    finally:
        ledger.close()
    found: set[str] = set()
    for entry in entries:
        found |= set(_DIGEST.findall(canonical_json(entry.body))) | {entry.subject}
        summary = entry.body.get("summary") or {}
        found |= {str(summary.get("run")), Path(str(summary.get("run_folder"))).name}
    return found


def _reached(workspace: Workspace, runs: Iterable[Path], names: set[str]) -> set[Path]:
    """Artefacts that a run links, the ledger names or the pinned data made, and all that they were made from."""
    if (workspace.root / PIN).exists():
        names = names | {dataversions.pinned(workspace.root).digest()}
    manifests = {folder.resolve(): _manifest(folder) for folder in workspace.store.artefacts()}
    made: dict[str, list[Path]] = {}
    for folder, manifest in manifests.items():
        made.setdefault(sha256_text(canonical_json(manifest.get("record"))), []).append(folder)
    linked = {path.resolve() for run in runs for path in run.rglob("*") if path.is_symlink()}
    roots = [folder for folder, manifest in manifests.items() if folder in linked or _is_named(manifest, names)]
    found: set[Path] = set()
    while roots:
        folder = roots.pop()
        if folder not in found:
            found.add(folder)
            roots += [source for digest in manifests[folder].get("inputs", {}).values() for source in made.get(digest, [])]
    return found


def _is_named(manifest: dict[str, Any], names: set[str]) -> bool:
    if not manifest:
        return True  # It does not verify: `store verify` tells what is wrong, and sets it aside.
    digests = {sha256_text(canonical_json(manifest["record"])), *(file["sha256"] for file in manifest["files"])}
    return bool((digests | {manifest["inputs"].get("data")}) & names)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        return unseal((folder / MANIFEST).read_bytes()) or {}
    except OSError:
        return {}


def _remove(workspace: Workspace, unreached: Iterable[Unreached], caches: Iterable[CacheFolder]) -> None:
    """Links before what they point at; an artefact is set aside first, so that a kill leaves none that is half there."""
    for each in unreached:
        if each.kind in ("run", "unfinished"):
            shutil.rmtree(each.folder)
        elif each.kind == "artefact":
            workspace.store.discard(each.folder)
    for cache in caches:
        cache.remove()
    shutil.rmtree(workspace.store.root / ".discarded", ignore_errors=True)


def _unreached(kind: Kind, folder: Path) -> Unreached:
    return Unreached(kind, folder, _size(folder))


def _files(folder: Path) -> list[os.stat_result]:
    found = (Path(place, name) for place, _, files in os.walk(folder) for name in files)
    return [path.lstat() for path in found if not path.is_symlink()]


def _size(folder: Path) -> int:
    return sum(status.st_size for status in _files(folder))


def _last_change(folder: Path) -> float:
    return max((status.st_mtime for status in _files(folder)), default=folder.stat().st_mtime)


def _seconds(moment: str) -> float:
    return datetime.datetime.fromisoformat(moment).timestamp()
