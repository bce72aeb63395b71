"""The sheet: one CSV file with a row for each issue, which a person fills in a page, an editor or a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from components.contracts.errors import DataError
from components.contracts.wording import counted, for_spreadsheets, separator_of
from flows.reviewing.cards import Card
from flows.reviewing.deciding import Decision, normalised

ASKED = ("data_version", "issue", "kind", "score", "file", "sha256", "label", "candidate", "twin", "proposal")
ANSWERED = ("decision", "note")
COLUMNS = (*ASKED, *ANSWERED)
MAX_BYTES = 256 << 20
_MAX_NOTE = 500
_SHOWN_TWINS = 20


@dataclass(frozen=True)
class Row:
    """A row that a person decided, and the line of the file that it begins on."""

    line: int
    values: Mapping[str, str]


def asked_row(version: str, card: Card) -> dict[str, str]:
    """What is asked about a card, by column."""
    twins = [file.path for file in card.twins]
    shown = " | ".join(twins[:_SHOWN_TWINS]) + (f" | and {len(twins) - _SHOWN_TWINS} more" * (len(twins) > _SHOWN_TWINS))
    proposal = card.proposal if len(card.copies) <= _SHOWN_TWINS else f"remove {len(card.copies)} files"
    values = {
        "data_version": version,
        "issue": card.issue.id,
        "kind": card.issue.kind,
        "score": f"{card.issue.score:.4f}",
        "file": card.file.path if card.file else "",
        "sha256": card.file.sha256 if card.file else "",
        "label": card.file.label if card.file else "",
        "candidate": card.label,
        "twin": shown,
        "proposal": proposal,
    }
    return {name: for_spreadsheets(value) for name, value in values.items()}


def text(rows: Sequence[Mapping[str, str]]) -> bytes:
    """The file's bytes, with nothing decided; with a byte order mark, by which spreadsheets know that it is UTF-8."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode("utf-8-sig")


def read(path: Path) -> list[Row]:
    """The rows in which something is decided or noted. Raises DataError for what is no such file."""
    expected = "a file that `visionloop data review` wrote, or that its page saved into the browser's downloads"
    if path.suffix == ".html":
        raise DataError(f"{path} is the page; expected the CSV file that it saves into the browser's downloads")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path} has more than {MAX_BYTES >> 20} MB; expected {expected}")
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as CSV UTF-8") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); expected {expected}") from error
    separator = separator_of(content.partition("\n")[0])
    lines = csv.reader(io.StringIO(content, newline=""), delimiter=separator, strict=True)
    rows: list[Row] = []
    try:
        header = next(lines, [])
        _check_header(path, header, expected)
        problems, last = [], lines.line_num
        for values in lines:
            line, last = last + 1, lines.line_num
            if not any(values):
                continue
            if len(values) != len(header):
                problems.append(f"line {line}: {counted(len(values), 'value')}, expected {len(header)}")
                continue
            row = Row(line, dict(zip(header, values, strict=True)))
            if any(row.values[name].strip() for name in ANSWERED):
                rows.append(row)
    except csv.Error as error:
        raise DataError(f"{path} line {lines.line_num} is no CSV ({error}); expected {expected}") from error
    refuse(path, problems)
    return rows


def _check_header(path: Path, header: Sequence[str], expected: str) -> None:
    if sorted(header) == sorted(COLUMNS):
        return
    missing = [name for name in COLUMNS if name not in header]
    extra = [name for name in header if name not in COLUMNS]
    told = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(map(repr, extra[:5]))} too"] * bool(extra)
    raise DataError(
        f"{path}: the first line {' and '.join(told) or 'names a column twice'}; expected {expected}, with the columns "
        f"{', '.join(COLUMNS)}"
    )


def refuse(path: Path | str, problems: Sequence[str]) -> None:
    """Raise a DataError that tells every problem, if there is one."""
    if problems:
        error = DataError(f"{path}: {counted(len(problems), 'problem')}; nothing was changed")
        for problem in problems:
            error.add_note(problem)
        raise error


def decisions(path: Path, rows: Sequence[Row], asked: Callable[[str], Mapping[str, Card]]) -> list[Decision]:
    """What the rows decide, one for each issue; `asked` gives the cards of a data version.

    Raises DataError with every problem by line: issues that were not asked, what was asked and is another thing now, and
    decisions that contradict each other.
    """
    problems: list[str] = []
    cards: dict[str, Mapping[str, Card]] = {}
    found: dict[str, Decision] = {}
    for row in rows:
        values, place = row.values, f"line {row.line}"
        version, issue = values["data_version"], values["issue"]
        if version not in cards:
            cards[version] = asked(version)
            if not cards[version]:
                problems.append(
                    f"{place}: nothing was asked about data version {version[:40]!r} in this workspace; where that is its "
                    f"version, `visionloop data review` asks it"
                )
        card = cards[version].get(issue)
        if card is None:
            if cards[version]:
                problems.append(f"{place}: issue {issue[:40]!r} was not asked about data version {version}")
            continue
        changed = _changed(values, asked_row(version, card))
        if changed:
            problems.append(f"{place}: {changed}; only {' and '.join(ANSWERED)} are to be filled")
            continue
        said, note = normalised(values["decision"]), _one_line(values["note"])[:_MAX_NOTE]
        if not said:
            continue
        before = found.get(issue)
        if before is not None and before.said != said:
            problems.append(f"{place}: issue {issue} is {said!r} here and {before.said!r} in {before.place}")
        found.setdefault(issue, Decision(place, card, said, note))
    refuse(path, problems)
    return list(found.values())


def _one_line(text: str) -> str:
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def _changed(values: Mapping[str, str], asked: Mapping[str, str]) -> str:
    """Which column is not as it was asked. The score decides nothing, and spreadsheets make all kinds of numbers of it."""
    for name in ASKED:
        given = values[name]
        if name != "score" and not _is_same(given, asked[name]):
            return f"{name} is {given[:80]!r}, and was {asked[name][:80]!r} when it was asked"
    return ""


def _is_same(given: str, asked: str) -> bool:
    """Also where a spreadsheet took a label for a number or a truth value: 007 comes back as 7, true as TRUE."""
    if given == asked or (given in ("TRUE", "FALSE") and given == asked.upper()):
        return True
    try:
        return float(given) == float(asked)
    except ValueError:
        return False
