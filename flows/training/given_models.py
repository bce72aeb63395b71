"""Models that a training is given: the champion that it goes on from (a warm start), and the teacher that it learns from.

A run whose training is done keeps which ones they were, by a file each in its run folder: started again, it finds the same
results, whatever was promoted or removed since. Data that grew make another run, which takes the champions of its own day.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from components import history
from components.contracts.data import DataVersion, Renames
from components.contracts.errors import ConfigError, DataError, TamperedArtefact
from components.contracts.models import Checkpoint
from components.contracts.records import Stored
from components.distillation import Teacher, expect_teaches, stored_checkpoint
from components.store import seal, unseal, write_atomically
from components.training import TrainingConfig, expect_same_network
from registry.models import Registry

Role = Literal["warm_start", "teacher"]


@dataclass(frozen=True)
class GivenModel:
    """A model of ours that a training begins from or learns from."""

    role: Role
    named: str
    """What it is, in words."""
    version: str
    """Of the registered model; empty for a checkpoint that is no version."""
    weights: str
    """Their sha256."""
    fetch: Callable[[], Stored[Checkpoint]]
    """The verified checkpoint; asked only when there is something to train."""
    digest: str = ""
    """Of the checkpoint's record; empty in what a run keeps of a warm start."""
    backbone: str = ""
    """Its plug-in; empty like the digest, and in files of before a teacher's was kept."""
    renamed: Renames = ()
    """The classes that got other names since it was trained."""
    note: str = ""
    """What a person has to know of it."""
    kept: bool = False
    """Whether the run was given it before, and its training is done."""

    @property
    def told(self) -> str:
        return f"{self.named} (weights {self.weights[:16]})"


def warm_start(
    model: str, config: TrainingConfig, data: DataVersion, registry: Registry, *, run: Path, cache: Path
) -> GivenModel:
    """The champion that the run on `data` in the folder `run` begins from, or began from; `cache` takes its checkpoint.

    Raises ConfigError where the model has none, or one of another network; TamperedArtefact, RegistryUnavailable.
    """
    found = _champion("warm_start", model, data, registry, run=run, out=cache / "champions" / model / "checkpoint")
    if not found.kept:
        expect_same_network(config, found.fetch().record, f"version {found.version} of {model}, the champion")
    return found


def teacher(
    config: Teacher, data: DataVersion, registry: Registry | None = None, *, run: Path, root: Path, cache: Path
) -> GivenModel:
    """The teacher of the run on `data` in the folder `run` of the workspace `root`; `cache` takes a champion's checkpoint.

    A checkpoint is found without a registry. Raises ConfigError where there is no such teacher; TamperedArtefact,
    RegistryUnavailable.
    """
    if config.champion:
        assert registry is not None, "a champion is looked up in a registry"
        out = cache / "teachers" / config.champion / "checkpoint"
        return _champion("teacher", config.champion, data, registry, run=run, out=out, root=root)
    named, folder = f"checkpoint {config.checkpoint}", root / config.checkpoint
    if (before := _kept("teacher", run)) is not None:
        return _as_kept("teacher", named, before, lambda: stored_checkpoint(folder)[0])
    checkpoint, version = stored_checkpoint(folder)
    record, pinned = checkpoint.record, _version_of(root, version)
    renamed = data.renames_since(pinned) if pinned else ()
    note = "" if pinned else _UNKNOWN_DATA
    given = record.weights.sha256, lambda: checkpoint, record.digest(), record.backbone
    return GivenModel("teacher", named, "", *given, renamed, note)


_UNKNOWN_DATA = "it was trained on data that no version here pins, so it may have learned from what are test images here"


def expect_to_teach(given: GivenModel, classes: Sequence[str], task: str) -> None:
    """Raise ConfigError where the teacher does not answer what is to be learned."""
    if not given.kept:
        expect_teaches(given.fetch().record, given.renamed, classes, task, f"the teacher, {given.named}")


def _champion(
    role: Role, model: str, data: DataVersion, registry: Registry, *, run: Path, out: Path, root: Path | None = None
) -> GivenModel:
    """Today's champion of a model, or the one that the run in this folder was given.

    With the `root` of the workspace it is noted where its data are not known there.
    """

    def fetch(version: str) -> tuple[Stored[Checkpoint], DataVersion]:
        return registry.fetch_checkpoint(model, version, out=out)

    named = "champion" if role == "warm_start" else f"champion of {model}"
    if (before := _kept(role, run)) is not None:
        return _as_kept(role, f"{named}, version {before['version']}", before, lambda: fetch(before["version"])[0])
    entry = registry.champion(model)
    if entry is None:
        place, remedy = {
            "warm_start": ("training.weights: champion", "train from other weights first"),
            "teacher": (f"training.teacher: champion: {model}", "train it first, such as by the recipe transfer"),
        }[role]
        raise ConfigError(
            f"{place}: {model} has no champion, since none of its versions was promoted yet; {remedy}, and promote what "
            f"comes of it"
        )
    version = str(entry.body["version"])
    checkpoint, its_data = fetch(version)
    record = checkpoint.record
    renamed = data.renames_since(its_data)
    note = _UNKNOWN_DATA if root is not None and _version_of(root, its_data.dvc_hash) is None else ""
    told = f"{named}, version {version}"
    given = record.weights.sha256, lambda: checkpoint, record.digest(), record.backbone
    return GivenModel(role, told, version, *given, renamed, note)


def _version_of(root: Path, dvc_hash: str) -> DataVersion | None:
    """The version of this workspace's data that has this hash; None where its history knows none."""
    try:
        found = history.find(root, dvc_hash)
    except (ConfigError, DataError):
        return None
    return DataVersion(
        dvc_hash=found.dvc_hash,
        num_files=found.num_files,
        bytes=found.bytes,
        ledger_sha256=found.ledger_sha256,
        renamed=found.renamed,
    )


def keep(given: GivenModel, run: Path) -> None:
    """Let the run in this folder be given this model whenever it is started again."""
    kept = _file(given.role, run)
    if not kept.exists():
        said = {"version": given.version, "weights": given.weights, "renamed": [list(one) for one in given.renamed]}
        of_teacher = {"checkpoint": given.digest, "backbone": given.backbone, "note": given.note}
        write_atomically(kept, seal(said | (of_teacher if given.role == "teacher" else {})))


def _kept(role: Role, run: Path) -> dict[str, Any] | None:
    """What the run in this folder kept of the model that it was given; None before that."""
    kept = _file(role, run)
    if not kept.exists():
        return None
    body = unseal(kept.read_bytes())
    if body is None:
        what = "go on from today's champion" if role == "warm_start" else "learn from today's teacher"
        raise TamperedArtefact(f"{kept} was changed after it was written; remove it to {what}")
    return body


def _as_kept(role: Role, named: str, body: dict[str, Any], fetch: Callable[[], Stored[Checkpoint]]) -> GivenModel:
    # Files of before classes could get other names say nothing of them.
    renamed = tuple((old, new) for old, new in body.get("renamed", ()))
    of_teacher = (body.get("checkpoint", ""), body.get("backbone", ""))
    note = body.get("note", "")
    return GivenModel(role, named, body["version"], body["weights"], fetch, *of_teacher, renamed, note, kept=True)


def _file(role: Role, run: Path) -> Path:
    return run / f"{role}.json"
