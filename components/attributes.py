"""What is known of a file beside its class: `data.attributes.csv`, a companion of the pinned data version.

Columns of a project's own, such as the weather, are in `data.columns.csv`: only slices of the test images look at them.

One row a file, by the sha256 of its bytes, so that it holds whatever the file is called; only rows that say something. A
column that is said again replaces what was known, an empty one says nothing, and a model's label never replaces a person's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from components.companions import ATTRIBUTES, FURTHER, Companion
from components.contracts.errors import ConfigError, DataError
from components.contracts.records import canonical_json
from components.contracts.wording import is_text, utc_of

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
    further: str = ""
    """Columns of the project's own, as canonical JSON of text by name."""

    @property
    def columns(self) -> dict[str, str]:
        """The columns of the project's own that say something."""
        return dict(json.loads(self.further)) if self.further else {}


COLUMNS = Attributes._fields[:-1]
"""Those that mean something to visionloop."""
_MOST_FURTHER = 20


class Changed(NamedTuple):
    """A value that was known, and what was said later."""

    sha256: str
    column: str
    known: str
    said: str
    is_kept: bool
    """Whether what was known stays: a model's label does not replace a person's."""


def attributes_of(values: Mapping[str, object], *, further: Mapping[str, object] | None = None) -> Attributes:
    """What a row says, in the form that is kept; `further` are columns of the project's own.

    Raises ValueError that says which column is wrong and what was expected.
    """
    unknown = sorted(values.keys() - set(COLUMNS))
    if unknown:
        raise ValueError(f"unknown column {unknown[0]!r}; valid: {', '.join(COLUMNS)}")
    own = {column: _text(column, value) for column, value in (further or {}).items()}
    said = {column: _text(column, value) for column, value in values.items()}
    if filled := {column: text for column, text in own.items() if text}:
        said["further"] = canonical_json(filled)
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


def expect_further(columns: Iterable[str]) -> None:
    """Raises ConfigError unless these can be columns of a project's own."""
    names = list(columns)
    wrong = [name for name in names if name in (*COLUMNS, "path", "label", "split") or not is_text(name) or not name.strip()]
    if wrong:
        raise ConfigError(f"columns has {wrong[0]!r}, which is a column already or no name; expected those of your own")
    if len(set(names)) < len(names) or len(names) > _MOST_FURTHER:
        raise ConfigError(f"columns has {len(names)} names; expected at most {_MOST_FURTHER}, each once")


def _text(column: str, value: object) -> str:
    if not isinstance(value, (str, int, float, type(None))) or isinstance(value, bool):
        raise ValueError(f"{column} is {value!r}; expected text")
    text = "" if value is None else str(value).strip()
    if not is_text(text) or len(text) > _LONGEST:
        raise ValueError(f"{column} is {text[:40]!r}; expected one line of at most {_LONGEST} characters")
    return text


def read(root: Path) -> dict[str, Attributes]:
    """What the workspace `root` knows, by sha256; raises DataError for anything but what this module wrote."""
    known: dict[str, Attributes] = {}
    for sha256, *values in ATTRIBUTES.read(root).itertuples(index=False):
        known[sha256] = found = Attributes(*values)
        try:
            said = {column: getattr(found, column) for column in COLUMNS}
            if not _SHA256.fullmatch(sha256) or not any(found) or found != attributes_of(said):
                raise ValueError("expected a sha256, and what is known in the form that it was written in")
        except ValueError as error:
            raise _no_row(root, ATTRIBUTES, sha256, error) from error
    for sha256, text in FURTHER.read(root).itertuples(index=False):
        try:
            if not _SHA256.fullmatch(sha256) or not text or attributes_of({}, further=json.loads(text)).further != text:
                raise ValueError("expected a sha256, and an object of text in the form that it was written in")
        except (ValueError, AttributeError, RecursionError) as error:
            raise _no_row(root, FURTHER, sha256, error) from error
        known[sha256] = known.get(sha256, Attributes())._replace(further=text)
    return known


def _no_row(root: Path, companion: Companion, sha256: str, error: Exception) -> DataError:
    return DataError(
        f"{root / companion.file} has a row {sha256[:64]!r} that is none ({error}); restore it with "
        f"`git checkout -- {companion.file}`"
    )


def sources(root: Path) -> dict[str, str]:
    """Where files of the workspace `root` come from, by sha256, as far as that is known."""
    return {sha256: one.source for sha256, one in read(root).items() if one.source}


def write(root: Path, known: Mapping[str, Attributes]) -> None:
    """Write all that says something, as the companion of the workspace's next data version."""
    ATTRIBUTES.write(root, ATTRIBUTES.frame({sha256: one[:-1] for sha256, one in known.items() if any(one[:-1])}))
    FURTHER.write(root, FURTHER.frame({sha256: (one.further,) for sha256, one in known.items() if one.further}))


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
        own_old, own_new = old.columns, new.columns
        changed += [
            Changed(sha256, column, own_old[column], now, False)
            for column, now in own_new.items()
            if own_old.get(column, now) != now
        ]
        if own_new:
            new = new._replace(further=canonical_json({**own_old, **own_new}))
        pairs = zip(COLUMNS, old, new, strict=False)
        changed += [Changed(sha256, column, was, now, False) for column, was, now in pairs if was and now and was != now]
        whole = Attributes(*(now or was for was, now in zip(old, new, strict=True)))
        if any(whole):
            after[sha256] = whole
    return after, changed


FILE = "attributes.jsonl"
"""What a source writes beside its pictures: one object a file, with `file` and what is known of it."""
LEFT_OUT = "left_out.jsonl"
"""The same for what it did not take, which a person is told: `file` and `reason`."""


def expect_no_class(folder: Path) -> None:
    """Raise DataError where a class has the name of a file that a source writes beside its pictures."""
    if taken := [name for name in (FILE, LEFT_OUT) if (folder / name).is_dir()]:
        raise DataError(f"a class cannot be called {taken[0]}: it is the name of a file that a source writes; rename it")


def write_said(folder: Path, said: Iterable[tuple[str, Attributes]]) -> None:
    """Write what a source knows, (file relative to `folder`, attributes); raises DataError for a class of that name."""
    expect_no_class(folder)
    with (folder / FILE).open("w", encoding="utf-8") as out:
        for file, one in said:
            if any(one):
                values: dict[str, object] = {column: value for column in COLUMNS if (value := getattr(one, column))}
                if one.further:
                    values["further"] = one.columns
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
                said[name] = attributes_of(row, further=row.pop("further", None))
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise DataError(f"{path.name}, line {number}: {error}; expected an object with `file`") from error
    return said
