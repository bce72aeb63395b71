"""What is known of a file beside its class: `data.attributes.csv`, a companion of the pinned data version.

One row a file, by the sha256 of its bytes, so that it holds whatever the file is called; only rows that say something. A
column that is said again replaces what was known, an empty one says nothing, and a model's label never replaces a person's.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from components.contracts.errors import DataError
from components.contracts.wording import is_text, utc_of
from components.store import write_atomically

ATTRIBUTES = "data.attributes.csv"
LABEL_SOURCES = ("person", "model")
"""Who labelled a file: `model` marks pseudo-labels, which only ever train."""
_LONGEST = 255
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Attributes(NamedTuple):
    """What is known of one file; what is empty is not known."""

    group: str = ""
    """What belongs together, such as a part, a patient or a clip: all of it falls on one side of a split."""
    captured_at: str = ""
    """ISO 8601 in UTC."""
    source: str = ""
    """Where the picture or its label comes from, such as a camera."""
    label_source: str = ""
    """`person` or `model`."""
    confidence: str = ""
    """Of the label, in [0, 1]."""


class Changed(NamedTuple):
    """A value that was known, and what was said later."""

    sha256: str
    column: str
    known: str
    said: str
    is_kept: bool
    """Whether what was known stays: a model's label does not replace a person's."""


def attributes_of(values: Mapping[str, object]) -> Attributes:
    """What a row says, in the form that is kept; raises ValueError that says which column is wrong and what was expected."""
    unknown = sorted(values.keys() - set(Attributes._fields))
    if unknown:
        raise ValueError(f"unknown column {unknown[0]!r}; valid: {', '.join(Attributes._fields)}")
    said: dict[str, str] = {}
    for column, value in values.items():
        if not isinstance(value, (str, int, float, type(None))) or isinstance(value, bool):
            raise ValueError(f"{column} is {value!r}; expected text")
        text = "" if value is None else str(value).strip()
        if not is_text(text) or len(text) > _LONGEST:
            raise ValueError(f"{column} is {text[:40]!r}; expected one line of at most {_LONGEST} characters")
        said[column] = text
    if when := said.get("captured_at"):
        try:
            said["captured_at"] = utc_of(when).isoformat().replace("+00:00", "Z")
        except (ValueError, OverflowError) as error:
            raise ValueError(f"captured_at {when!r} is {error}") from None
    if (who := said.get("label_source")) and who not in LABEL_SOURCES:
        raise ValueError(f"label_source is {who!r}; expected person, model, or nothing")
    if share := said.get("confidence"):
        try:
            number = float(share)
        except ValueError:
            number = math.nan
        if not 0 <= number <= 1:
            raise ValueError(f"confidence is {share!r}; expected a number from 0 to 1")
        said["confidence"] = repr(number)
    return Attributes(**said)


def read(path: Path) -> dict[str, Attributes]:
    """By sha256; empty where there is no file. Raises DataError for anything but a file that this module wrote."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return dict(_rows(file))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(
            f"{path} is not a readable table of attributes ({error}); restore it with `git checkout -- {path.name}`"
        ) from error


def _rows(file: Iterable[str]) -> Iterator[tuple[str, Attributes]]:
    reader = csv.reader(file, strict=True)
    header = next(reader, None)
    if header != ["sha256", *Attributes._fields]:
        raise ValueError(f"its first line is {header}")
    before = ""
    for row in reader:
        if len(row) != len(Attributes._fields) + 1 or not _SHA256.fullmatch(row[0]) or row[0] <= before:
            raise ValueError(f"line {reader.line_num} is no row, or not in its place")
        before = row[0]
        found = Attributes(*row[1:])
        if found != attributes_of(found._asdict()) or not any(found):
            raise ValueError(f"line {reader.line_num} is not as it was written")
        yield before, found


def write(path: Path, known: Mapping[str, Attributes]) -> None:
    """Sorted by sha256, the same bytes for the same content."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("sha256", *Attributes._fields))
    writer.writerows((sha256, *known[sha256]) for sha256 in sorted(known) if any(known[sha256]))
    write_atomically(path, text.getvalue().encode())


def learned(
    known: Mapping[str, Attributes], said: Iterable[tuple[str, Attributes]]
) -> tuple[dict[str, Attributes], list[Changed]]:
    """What is known after (sha256, what is said of it), and every value that was known and is said to be another."""
    after = dict(known)
    changed: list[Changed] = []
    for sha256, new in said:
        old = after.get(sha256, Attributes())
        is_kept = old.label_source == "person" and new.label_source == "model"
        if is_kept:
            changed.append(Changed(sha256, "label_source", "person", "model", True))
            new = new._replace(label_source="", confidence="")
        if old.label_source == "model" and new.label_source == "person":
            old = old._replace(label_source="", confidence="")  # the confidence was the model's
        pairs = zip(Attributes._fields, old, new, strict=True)
        changed += [Changed(sha256, column, was, now, False) for column, was, now in pairs if was and now and was != now]
        whole = Attributes(*(now or was for was, now in zip(old, new, strict=True)))
        if any(whole):
            after[sha256] = whole
    return after, changed


FILE = "attributes.jsonl"
"""What a source writes beside its pictures: one object a file, with `file` and what is known of it."""


def write_said(folder: Path, said: Iterable[tuple[str, Attributes]]) -> None:
    """Write what a source knows, (file relative to `folder`, attributes); nothing where it knows nothing."""
    with (folder / FILE).open("w", encoding="utf-8") as out:
        for file, one in said:
            if any(one):
                values = {column: value for column, value in one._asdict().items() if value}
                out.write(json.dumps({"file": file, **values}, ensure_ascii=False) + "\n")


def read_said(path: Path) -> dict[str, Attributes]:
    """What a source knows, by file; empty where it wrote nothing. Raises DataError that names the line."""
    said: dict[str, Attributes] = {}
    if not path.exists():
        return said
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                name = row.pop("file")
                if not isinstance(name, str) or name in said:
                    raise ValueError(f"file is {name!r}; expected the name of a file, each once")
                said[name] = attributes_of(row)
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise DataError(f"{path.name}, line {number}: {error}; expected an object with `file`") from error
    return said
