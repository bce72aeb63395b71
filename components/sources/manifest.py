"""A manifest: a CSV or JSONL file that names every picture, its label and what else is known of it, one a line.

Columns: path, label; as wanted also split (train, val, test), group, captured_at, source, label_source and confidence;
others, such as `weather`, where the setting `columns` names them. Paths are relative to the manifest's folder. A CSV file's
values are separated by commas, semicolons or tabs, as its first line is. All problems are told by line, and then nothing is
imported.

The suggestions of `visionloop data suggest`, with the labels that a person filled in, are one too: they have the column
`proposal`, their confidence is of that, and what nobody labelled is left out.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict

from components import attributes
from components.attributes import Attributes, attributes_of
from components.contracts.errors import DataError
from components.contracts.progress import Progress, silent
from components.contracts.wording import SEPARATORS, separator_of
from components.sources._listed import Listed

COLUMNS = ("path", "label", "split", *attributes.COLUMNS)
_NEEDED = ("path", "label")
_OF_SUGGESTIONS = ("proposal", "why", "found_as")
"""What the champion answered and why it was chosen, for the person who labels."""
_SUFFIXES = (".csv", ".jsonl")
_LONGEST_LINE = 2**20
_OF_MANY = ("group", "source", "label_source")
"""Columns whose values stand in many rows; each is kept once."""
_OF_CSV = {
    "new-line character seen in unquoted field": "a carriage return in the middle of a line (save it with the line ends LF)",
    "unexpected end of data": "double quotes begin here and never end",
}
"""What is wrong with a line, in place of the words of Python's csv."""
_OWN = "; --source-setting 'columns=[NAME]' keeps columns of your own"
_ROW = tuple[int, dict[str, object]]


class Source(BaseModel):
    """The files that a manifest names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    """The manifest, a .csv or .jsonl file in UTF-8."""
    root: Path | None = None
    """The folder that its paths are relative to, its own where none is given; absolute paths below it are taken, too."""
    classes: tuple[str, ...] = ()
    """The labels that may stand there, any where none is given."""
    columns: tuple[str, ...] = ()
    """Further columns to keep, such as `weather`: the test pictures are judged by slices of them."""

    @classmethod
    def takes(cls, given: str) -> bool:
        """Whether it is the name of a manifest."""
        return "://" not in given and given.casefold().endswith(_SUFFIXES)

    def fetch(self, *, out: Path, progress: Progress = silent) -> None:
        """Write links to its files into class folders, and what is known of them; raises DataError with a note a problem."""
        if not self.takes(self.path.name):
            raise DataError(f"{self.path} is no manifest by its name; expected a .csv or .jsonl file")
        if self.root is not None and not self.root.expanduser().is_dir():
            raise DataError(
                f"root {self.root} is not a folder; expected the one that the paths of {self.path} are relative to"
            )
        attributes.expect_further(self.columns)
        listed = Listed(self.path, self.root, noun="line", classes=self.classes)
        read = _csv if self.path.name.casefold().endswith(".csv") else _jsonl
        texts: dict[str, str] = {}
        try:
            num_bytes = self.path.stat().st_size
            with self.path.open("rb") as file:
                for count, (line, row) in enumerate(read(file, listed, self.columns)):
                    _take(line, row, listed, texts, self.columns)
                    if count % 1000 == 0:
                        progress(file.tell(), num_bytes, f"line {line}")
        except OSError as error:
            raise DataError(
                f"cannot read {self.path}: {error.strerror}; expected a manifest, a .csv or .jsonl file"
            ) from error
        listed.write(out, progress)


def _take(line: int, row: dict[str, object], listed: Listed, texts: dict[str, str], further: Sequence[str]) -> None:
    """Check one row; equal texts of several rows are kept once."""
    try:
        path, label, split = (_text(row.pop(column, None), column) for column in ("path", "label", "split"))
        if is_suggested := "proposal" in row:
            row = {"label_source": "person"} | {
                column: value for column, value in row.items() if column not in (*_OF_SUGGESTIONS, "confidence")
            }
        if is_suggested and path and not label:
            listed.leave_out(path, "nobody labelled it")
            return
        for column, value in (("path", path), ("label", label)):
            if not value:
                raise ValueError(f"{column} is empty")
        own = {column: row.pop(column, None) for column in further}
        says_more = any(value is not None and value != "" for value in (*row.values(), *own.values()))
        said = attributes_of(row, further=own) if says_more else Attributes()
    except ValueError as error:
        listed.problem(line, str(error))
        return
    listed.entry(
        line,
        path,
        texts.setdefault(label, label),
        split=texts.setdefault(split, split),
        attributes=said._replace(
            **{column: texts.setdefault(text, text) for column in _OF_MANY if (text := getattr(said, column))}
        ),
    )


def _text(value: object, column: str) -> str:
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # a label such as 7
    if not isinstance(value, str):
        raise ValueError(f"{column} is {str(value)[:80]!r}; expected text")
    return value


def _lines(file: BinaryIO, listed: Listed, bad: set[int]) -> Iterator[str]:
    """The lines of a file in UTF-8, with or without a byte order mark; those that are none are problems, and in `bad`."""
    number = 0
    while line := file.readline(_LONGEST_LINE):
        number += 1
        if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"{listed.path} is UTF-16; save it as UTF-8")
        if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
            raise DataError(f"{listed.path}: line {number} has more than {_LONGEST_LINE} bytes; expected one row a line")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            bad.add(number)
            listed.problem(number, f"byte {error.start + 1} is no UTF-8; save the file as UTF-8")
            yield line.decode(errors="replace")


def _csv(file: BinaryIO, listed: Listed, further: Sequence[str]) -> Iterator[_ROW]:
    bad: set[int] = set()
    lines = _lines(file, listed, bad)
    until_columns: list[str] = []
    for line in lines:
        until_columns.append(line)
        if line.strip():
            break
    separator = separator_of("".join(until_columns))
    reader = csv.reader(itertools.chain(until_columns, lines), delimiter=separator, strict=True)
    columns: list[str] | None = None
    while True:
        first = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            why = _OF_CSV.get(str(error).partition(" - ")[0], str(error))
            between = SEPARATORS[separator]
            listed.problem(first, f"{why}; expected values between {between}, in double quotes where they hold some")
            if columns is None:
                return
            continue
        if columns is None:
            if any(values):
                columns = _header(values, listed.path, first, further)
        elif not values or not bad.isdisjoint(range(first, reader.line_num + 1)):
            continue  # an empty line, or one that is told already
        elif len(values) != len(columns):
            listed.problem(first, f"it has {len(values)} values, expected {len(columns)} as in the first line")
        else:
            yield first, dict(zip(columns, values, strict=True))
    if columns is None:
        raise DataError(f"{listed.path} is empty; expected a first line with the columns {', '.join(COLUMNS)}")


def _header(values: list[str], path: Path, line: int, further: Sequence[str]) -> list[str]:
    columns = [value.strip() for value in values]
    if len(columns) == 1 and "|" in columns[0]:
        raise DataError(
            f"{path}: the columns are not separated by commas, semicolons or tabs (line {line} is {columns[0][:80]!r}); "
            f"save it as CSV"
        )
    if why := _wrong_columns(columns, further):
        raise DataError(f"{path}, line {line}: {why}; expected path, label and any of {', '.join(COLUMNS[2:])}{_OWN}")
    if missing := [column for column in further if column not in columns]:
        raise DataError(f"{path}, line {line}: there is no column {missing[0]!r}, which the setting `columns` names")
    return columns


def _wrong_columns(columns: list[str], further: Sequence[str]) -> str:
    valid = (*COLUMNS, *further, *_OF_SUGGESTIONS) if "proposal" in columns else (*COLUMNS, *further)
    if unknown := [column for column in columns if column not in valid]:
        return f"unknown column {unknown[0][:80]!r}"
    if missing := [column for column in _NEEDED if column not in columns]:
        return f"there is no column {missing[0]!r}"
    if twice := [column for column in valid if columns.count(column) > 1]:
        return f"column {twice[0]!r} is there twice"
    return ""


def _jsonl(file: BinaryIO, listed: Listed, further: Sequence[str]) -> Iterator[_ROW]:
    bad: set[int] = set()
    for number, line in enumerate(_lines(file, listed, bad), 1):
        if number in bad or not line.strip():
            continue
        try:
            found = json.loads(line.rstrip(), object_pairs_hook=_once)
            if not isinstance(found, dict):
                raise ValueError(
                    f"it is {line.strip()[:80]!r}; expected an object such as {{'path': 'a.jpg', 'label': 'cat'}}"
                )
            if why := _wrong_columns(list(found), further):
                raise ValueError(f"{why}; valid: {', '.join(COLUMNS)}{_OWN}")
        except json.JSONDecodeError as error:
            listed.problem(number, f"it is no JSON ({error.msg}, column {error.colno}); expected one object a line")
        except (ValueError, RecursionError) as error:
            listed.problem(number, str(error))
        else:
            yield number, found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a column is there twice")
    return found
