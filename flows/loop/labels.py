"""Labels in, data out: a file into the loop's tables, and labelled images of production into the next data version."""

from __future__ import annotations

import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from components import attributes
from components.attributes import Attributes
from components.contracts.errors import DataError
from components.contracts.releases import Release
from components.contracts.wording import counted
from components.formats import suffix_of
from components.images import decode
from components.samples import class_name_problem
from components.store import sha256_file
from flows.loop.captures import captures_of, kept_of, read_capture
from flows.loop.loop import Loop
from flows.loop.windows import champion_at, release_record, task_of
from flows.workspace.incoming import LeftOut
from flows.workspace.renaming import names_of_today
from flows.workspace.sources import Staged, clear_stale
from flows.workspace.workspace import Workspace
from monitoring.labels import Imported, read_file, resolve

if TYPE_CHECKING:
    from datetime import datetime

    from components.predictionlog import Stretch


@dataclass(frozen=True)
class LabelsTaken:
    """What came of labels that were given together."""

    imported: Imported
    unknown: int
    """Rows that were left out, as nothing in the log is named so."""
    labelled_images: int
    """Of the model, with these."""


@dataclass(frozen=True)
class LabelsCounted:
    """The labels that count: the newest of each image."""

    images: int
    classes: dict[str, int]
    labelled_by: dict[str, int]


def count_labels(loop: Loop) -> LabelsCounted:
    """How many images of production people labelled, by class and by person."""
    said = loop.labels.latest(loop.model).values()
    classes, people = Counter(label.label for label in said), Counter(label.by for label in said)
    return LabelsCounted(len(said), dict(sorted(classes.items())), dict(sorted(people.items())))


@dataclass(frozen=True)
class KnownPredictions:
    """What the log knows, or as much of it as was looked through."""

    by_prediction: Mapping[str, str]
    """Digest of the image by prediction id."""
    images: AbstractSet[str]
    problems: tuple[str, ...] = ()
    """Parts of the log that cannot be read."""

    def knows(self, row: Mapping[str, str]) -> bool:
        """Whether what a row names is among it."""
        return row["image_sha256"] in self.images or row["prediction_id"] in self.by_prediction


def import_labels(
    loop: Loop, path: Path, *, by: str | None, skip_unknown: bool = False, new_classes: bool = False
) -> LabelsTaken:
    """Take a file of labels, whole or not at all.

    Raises ConfigError or DataError; then nothing was imported.
    """
    rows = read_file(path, by=by)
    if not any(row["label"] for row in rows):
        raise DataError(f"{path} holds no label: fill the column `label`, rows without one are left out")
    source, known = sha256_file(path)[:16], known_predictions(loop)
    return take_labels(loop, rows, known, source=source, skip_unknown=skip_unknown, new_classes=new_classes)


def take_labels(
    loop: Loop,
    rows: Sequence[Mapping[str, str]],
    known: KnownPredictions,
    *,
    source: str,
    skip_unknown: bool = False,
    new_classes: bool = False,
) -> LabelsTaken:
    """Take labels wherever they come from, all of them or none; `source` names what they came in.

    `rows` are as `monitoring.labels.checked` gives them. Raises DataError; then nothing was imported.
    """
    given = [row for row in rows if row["label"]]
    num_skipped, unknown = len(rows) - len(given), 0
    if skip_unknown:
        there = [row for row in given if known.knows(row)]
        unknown, given = len(given) - len(there), there
        if unknown and known.problems:
            raise DataError(
                f"the log does not know {counted(unknown, 'row')} of the file, but part of it cannot be read "
                f"({known.problems[0]}): they may be there. Nothing was imported; see `visionloop predictions verify`"
            )
    champion = None if new_classes else _champion(loop)
    try:
        labels = resolve(
            given,
            by_prediction=known.by_prediction,
            images=known.images,
            classes=_known_classes(loop, champion) if champion else (),
            task=task_of(champion) if champion else None,
        )
    except DataError as error:
        for problem in known.problems[:1]:
            error.add_note(f"part of the prediction log cannot be read: {problem}")
        raise
    imported = loop.labels.append(loop.model, labels, source=source, skipped=num_skipped)
    return LabelsTaken(imported, unknown, len(loop.labels.latest(loop.model)))


def _known_classes(loop: Loop, champion: Release) -> tuple[str, ...]:
    """The classes of the champion by its names and by those of today, and those that the data has besides."""
    return tuple(dict.fromkeys((*champion.engine.classes, *classes_of_today(loop, champion))))


def classes_of_today(loop: Loop, champion: Release | None = None) -> tuple[str, ...]:
    """The names of today of the classes that the champion or the data has; raises DataError where there is no champion."""
    champion = champion or _champion(loop)
    task, data, name_of = task_of(champion), loop.workspace.data, names_of_today(loop.workspace)
    folders = [path.name for path in data.glob("*") if path.is_dir() and class_name_problem(path.name) is None]
    return tuple(sorted({*map(name_of, champion.engine.classes), *task.classes(folders)}))


def known_predictions(loop: Loop) -> KnownPredictions:
    """All that the log holds of the model."""
    log = _whole_log(loop, "prediction_id", "image_sha256")
    pairs: dict[str, str] = {}
    for table in log.tables:
        pairs |= dict(zip(table["prediction_id"].to_pylist(), table["image_sha256"].to_pylist(), strict=True))
    return KnownPredictions(pairs, set(pairs.values()), log.problems)


def _whole_log(loop: Loop, *columns: str) -> Stretch:
    """Columns of all that the log holds of the model."""
    from datetime import UTC, datetime, timedelta

    from components.predictionlog import read_stretch

    since, until = datetime.fromtimestamp(0, UTC), datetime.now(UTC) + timedelta(days=366)
    journals = loop.workspace.state / "serving" / "journal"
    needed = ("model", "ingest_at", *columns)
    return read_stretch(loop.settings.predictions_url, journals, model=loop.model, since=since, until=until, columns=needed)


def _first_sent(loop: Loop) -> dict[str, datetime]:
    """When each image was sent first, by the callers' clocks where they said it; parts that cannot be read say nothing."""
    first: dict[str, datetime] = {}
    for table in _whole_log(loop, "image_sha256", "event_at").tables:
        for sha, at in zip(table["image_sha256"].to_pylist(), table["event_at"].to_pylist(), strict=True):
            if at is not None and at.year > 1970:  # the clock of a device that was never set
                first[sha] = min(at, first.get(sha, at))
    return first


def _champion(loop: Loop) -> Release:
    from datetime import UTC, datetime

    entry = champion_at(loop, datetime.now(UTC))
    if entry is None:
        raise DataError(f"{loop.model} has no champion, so there is no list of its classes; use --new-classes")
    return release_record(loop, entry.body["release"])


_NAME = 24
"""Digits of an image's digest that name its file in the data."""


@dataclass(frozen=True)
class Gathered:
    """Labelled images of production, one folder a class, ready to be added."""

    staged: Staged
    not_kept: int
    """Labelled images whose bytes were not captured, or were erased or outdated since."""


def training_copies(workspace: Workspace, sha: str) -> list[str]:
    """Files of data/ that are the image of this sha256, as `gathered` names them."""
    found = [path for path in workspace.data.glob(f"*/{sha[:_NAME]}.*") if sha256_file(path) == sha]
    return sorted(str(path.relative_to(workspace.root)) for path in found)


def move_relabelled(loop: Loop) -> int:
    """Rename images of production into the class that they are said to show now; returns how many.

    Their files are named by their digest, so nothing else is touched, and a rename loses nothing, whenever it is cut short.
    Raises DataError, before anything is renamed, where a file of that name with other bytes would be overwritten.
    """
    data, name_of = loop.workspace.data, names_of_today(loop.workspace)
    classes = [folder for folder in data.glob("*") if folder.is_dir()]
    moves: dict[Path, list[Path]] = {}
    for sha, label in loop.labels.latest(loop.model).items():
        name = name_of(label.label)
        for folder in classes:
            if folder.name != name:
                for path in sorted(folder.glob(f"{sha[:_NAME]}.*")):
                    moves.setdefault(data / name / path.name, []).append(path)
    for target, paths in moves.items():
        first, *others = [target, *paths] if target.exists() else paths
        digest = sha256_file(first)
        for path in others:
            if sha256_file(path) != digest:
                raise DataError(
                    f"{path} is said to show {target.parent.name!r} now, and {first} has its name and other bytes: moved, "
                    f"one would overwrite the other. Nothing was moved; rename or remove one of them and try again"
                )
    for target, paths in moves.items():
        target.parent.mkdir(exist_ok=True)
        for path in paths:
            path.replace(target)
    return sum(len(paths) for paths in moves.values())


@contextmanager
def gathered(loop: Loop) -> Iterator[Gathered]:
    """The images that were captured and labelled, copied into a folder for as long as the context lasts, and what is known.

    Each is checked against the sha256 it is named by. Raises DataError when there is none.
    """
    said, name_of = loop.labels.latest(loop.model), names_of_today(loop.workspace)
    there = kept_of(loop, said.keys())
    scratch = loop.workspace.state / "tmp" / f"labelled-{uuid.uuid4().hex}"
    clear_stale(loop.workspace)
    told = f"production of {loop.model}"
    first_sent, known = _first_sent(loop), attributes.read(loop.workspace.root)
    said_of: dict[str, Attributes] = {}
    damaged: list[LeftOut] = []
    try:
        for sha, label in sorted(said.items()):
            if sha not in there:
                continue
            try:
                data = read_capture(loop, sha)
                decode(data)
            except DataError:
                damaged.append(LeftOut(sha, "captured, and its bytes are damaged"))
                continue
            written = scratch / name_of(label.label) / sha[:_NAME]
            written.parent.mkdir(parents=True, exist_ok=True)
            written.write_bytes(data)
            file = written.rename(written.with_name(f"{written.name}{suffix_of(written)}"))
            # Only what nobody said of these bytes before: production sees pictures again that a source has told more of.
            there_is = known.get(sha, Attributes())
            at = first_sent.get(sha)
            said_of[file.relative_to(scratch).as_posix()] = Attributes(
                captured_at="" if at is None or there_is.captured_at else at.isoformat().replace("+00:00", "Z"),
                source="" if there_is.source else told,
                label_source="person",
            )
        if not said_of:
            raise DataError(
                f"no image of {loop.model} is both captured and labelled ({len(said)} labelled, "
                f"{len(captures_of(loop.workspace, loop.settings).names())} captured). "
                f"Serve with --capture-share, and import labels (visionloop labels import FILE)"
            )
        yield Gathered(Staged(scratch, said_of, damaged, told), len(set(said) - there))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
