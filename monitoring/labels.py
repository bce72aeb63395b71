"""Labels that come back: who said what an image of production shows, and when. Appended, never changed.

A file is taken whole or not at all. The newest label of an image counts; the others stay.
"""

from __future__ import annotations

import csv
import datetime
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from components.contracts.errors import ConfigError, DataError
from components.contracts.families import Task
from components.contracts.records import canonical_json, sha256_text
from components.contracts.wording import counted, utc_of
from components.databases import Database, now
from components.samples import class_name_problem
from components.tables import num_rows, read_table
from monitoring.records import labels

MAX_ROWS = 1_000_000
MAX_BYTES = 256 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHOWN = 5


@dataclass(frozen=True)
class Label:
    """One person's word about one image."""

    image_sha256: str
    label: str
    by: str
    at: str
    """UTC, ISO 8601."""


@dataclass(frozen=True)
class Imported:
    """What came of labels that were given together, in a file or on a page."""

    new: int
    known: int
    """Labels that were there already, word for word."""
    changed: int
    """Images that had another label before."""
    skipped: int
    """Rows without a label."""


def read_file(path: Path, *, by: str | None) -> list[dict[str, str]]:
    """Rows of a .csv, .jsonl or .parquet file: prediction_id or image_sha256, label, and perhaps labelled_by, labelled_at.

    Raises ConfigError for another kind of file, DataError naming the row for what is no label.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is not a file; expected .csv, .jsonl or .parquet with the columns prediction_id, label")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path} has more than {MAX_BYTES >> 20} MB; import it in parts")
    rows = _rows(path)
    if len(rows) > MAX_ROWS:
        raise DataError(f"{path} has more than {MAX_ROWS} rows; import it in parts")
    if not rows:
        raise DataError(f"{path} holds no rows")
    if any(None in row for row in rows):
        raise DataError(f"{path}: a row has more values than the first line has names; put quotes around values with commas")
    columns = set(rows[0])
    if "label" not in columns or not columns & {"prediction_id", "image_sha256"}:
        raise DataError(
            f"{path} has the columns {', '.join(sorted(columns))}; expected label and prediction_id or image_sha256"
        )
    return checked(rows, by=by, place=lambda number: f"{path} row {number}")


def checked(
    rows: Sequence[Mapping[str, Any]], *, by: str | None, place: Callable[[int], str] = lambda number: f"label {number}"
) -> list[dict[str, str]]:
    """Rows with prediction_id or image_sha256, label, and perhaps labelled_by, labelled_at; `place` names one by its number.

    A row without a label stays one; `by` labelled where a row names nobody. Raises DataError for what is no label.
    """
    found = []
    for number, row in enumerate(rows, start=1):
        values = {name: "" if value is None else str(value) for name, value in row.items() if name}
        # A class is compared letter by letter: white space around it is refused, as in names of folders, not taken away.
        values = {name: value if name == "label" else value.strip() for name, value in values.items()}
        if not values.get("label"):
            found.append({"label": ""})
            continue
        problem = class_name_problem(values["label"])
        if problem:
            raise DataError(
                f"{place(number)}: {values['label'][:80]!r} cannot be the name of a class: {problem}; "
                f"correct it and give all of them again"
            )
        who = values.get("labelled_by") or by or ""
        if not who:
            raise DataError(f"{place(number)}: nobody is named; fill labelled_by, or give --as")
        if len(who) > 128 or not who.isprintable():
            raise DataError(f"{place(number)}: labelled_by is a name of at most 128 characters")
        when = values.get("labelled_at", "")
        found.append(
            {
                "prediction_id": values.get("prediction_id", ""),
                "image_sha256": values.get("image_sha256", "").lower(),
                "label": values["label"],
                "by": who,
                "at": _when(when, place(number)) if when else "",
            }
        )
        sha = found[-1]["image_sha256"]
        if sha and not _SHA256.fullmatch(sha):
            raise DataError(f"{place(number)}: {sha[:80]!r} is not the sha256 of an image (64 hex digits)")
        if not sha and not found[-1]["prediction_id"]:
            raise DataError(f"{place(number)} names no prediction_id and no image_sha256")
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            if num_rows(path) > MAX_ROWS:
                raise ValueError(f"more than {MAX_ROWS} rows; import it in parts")
            found: list[dict[str, Any]] = read_table(path).to_pylist()
            return found
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
            if not all(isinstance(line, dict) for line in lines):
                raise ValueError("a line is no object")
            return lines
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as file:
                return list(csv.DictReader(file, strict=True))
    except Exception as error:
        # csv, json, UnicodeDecodeError, and whatever pyarrow raises for what is no Parquet.
        raise DataError(f"{path} cannot be read as {path.suffix}: {str(error).splitlines()[0][:200]}") from error
    raise ConfigError(f"{path.name}: expected a name that ends in .csv, .jsonl or .parquet")


def _when(text: str, place: str) -> str:
    try:
        found = utc_of(text)
    except ValueError as error:
        raise DataError(f"{place}: labelled_at {text!r} is {error}") from None
    if found > datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=5):
        # It would count before every correction until then.
        raise DataError(f"{place}: labelled_at {text!r} has not come yet; times without a zone are taken for UTC")
    return found.isoformat(timespec="microseconds")


def resolve(
    rows: Sequence[Mapping[str, str]],
    *,
    by_prediction: Mapping[str, str],
    images: Collection[str],
    classes: Collection[str],
    task: Task | None,
) -> list[Label]:
    """Rows to labels of images the log knows. Raises DataError listing what is unknown; then nothing is imported.

    `by_prediction` maps prediction ids to image digests. `classes` are those that the model knows, and the task says which a
    label is about; without a task every label is taken.
    """
    found, unknown, wrong = [], [], set()
    named = {row["label"] for row in rows if row["label"]}
    strange = {label: set(task.classes([label])) - set(classes) for label in named} if task is not None else {}
    for row in rows:
        if not row["label"]:
            continue
        sha = row["image_sha256"] or by_prediction.get(row["prediction_id"], "")
        if row["image_sha256"] and row["prediction_id"]:
            told = by_prediction.get(row["prediction_id"])
            if told is not None and told != sha:
                raise DataError(
                    f"prediction {row['prediction_id'][:64]} is about image {told[:16]}, the row says {sha[:16]}; "
                    f"nothing was imported"
                )
        if not sha or sha not in images:
            unknown.append(row["prediction_id"] or row["image_sha256"])
            continue
        if strange.get(row["label"]):
            wrong |= strange[row["label"]]
            continue
        found.append(Label(sha, row["label"], row["by"], row["at"]))
    if unknown:
        shown = ", ".join(name[:64] for name in unknown[:_SHOWN]) + (", ..." if len(unknown) > _SHOWN else "")
        raise DataError(
            f"the log knows neither prediction nor image of {counted(len(unknown), 'row')} ({shown}); "
            f"nothing was imported. Check the file, or leave them out with --skip-unknown"
        )
    if wrong:
        told = ", ".join(repr(name) for name in sorted(wrong)[:_SHOWN])
        raise DataError(
            f"the model has no class {told}; nothing was imported. "
            f"Its classes: {', '.join(sorted(classes)[:20])}. New classes come in with --new-classes"
        )
    return found


class Labels:
    """Labels of production images behind one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def append(self, model: str, given: Sequence[Label], *, source: str, skipped: int = 0) -> Imported:
        """All of them in one transaction; what is there word for word is not written again.

        `source` names what they came in, such as the digest of a file: of a label without a time, the same source again is
        the same word again, and says nothing against a correction that came in between.
        """
        new = known = changed = 0
        with self._database.transaction() as connection:
            at = now(connection).isoformat(timespec="microseconds")
            latest = _latest(connection, model)
            there = set(connection.execute(sa.select(labels.c.key).where(labels.c.model == model)).scalars())
            rows = []
            for label in given:
                # Without a time of its own a label is the same however often its source comes; another source may change it.
                facts = [model, label.image_sha256, label.label, label.by, label.at or source]
                key = sha256_text(canonical_json(facts))
                earlier = latest.get(label.image_sha256)
                same = earlier is not None and (earlier.label, earlier.by) == (label.label, label.by) and not label.at
                if key in there or same:
                    known += 1
                    continue
                there.add(key)
                if earlier is None or (label.at or at) >= earlier.at:
                    changed += earlier is not None and earlier.label != label.label
                    latest[label.image_sha256] = Label(label.image_sha256, label.label, label.by, label.at or at)
                new += 1
                rows.append(
                    {
                        "key": key,
                        "image_sha256": label.image_sha256,
                        "model": model,
                        "label": label.label,
                        "by": label.by,
                        "at": label.at or at,
                        "imported_at": at,
                        "source": source,
                    }
                )
            if rows:
                connection.execute(labels.insert(), rows)
        return Imported(new, known, changed, skipped)

    def latest(self, model: str) -> dict[str, Label]:
        """The label that counts, by image."""
        with self._database.transaction() as connection:
            return _latest(connection, model)


def _latest(connection: sa.Connection, model: str) -> dict[str, Label]:
    query = sa.select(labels).where(labels.c.model == model).order_by(labels.c.at, labels.c.seq)
    return {row.image_sha256: Label(row.image_sha256, row.label, row.by, row.at) for row in connection.execute(query)}
