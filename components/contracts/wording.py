"""How moments, names and counts are read and written for people."""

from __future__ import annotations

import datetime
import unicodedata


def utc_of(text: str) -> datetime.datetime:
    """A moment that a person wrote, in UTC: ISO 8601 with an offset or Z, taken for UTC without one.

    Raises ValueError that says what is wrong with it.
    """
    text = text.strip()
    try:
        # Digits alone are more likely seconds since 1970, or a typing error, than a day.
        found = None if text.isdigit() else datetime.datetime.fromisoformat(text)
    except ValueError:
        found = None
    if found is None:
        raise ValueError("not a moment; expected ISO 8601, such as 2026-03-01T14:00, 2026-03-01T14:00+01:00 or 2026-03-01")
    if not 1970 < found.year < 9999:
        raise ValueError("not a moment after 1970 that a calendar knows")
    return found.replace(tzinfo=datetime.UTC) if found.tzinfo is None else found.astimezone(datetime.UTC)


def is_text(name: str) -> bool:
    """Whether a name is one line of text: no control characters, no line breaks, no bytes that are not UTF-8."""
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name)


def for_spreadsheets(value: str) -> str:
    """A value of a CSV file that no spreadsheet takes for a formula: the name of a file may begin like one."""
    return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
"""What may separate the values of a CSV file, and what that is called."""


def separator_of(header: str) -> str:
    """The one of a CSV file, by the line of its columns: which one a spreadsheet writes is a matter of its language."""
    return max(SEPARATORS, key=header.count)


def counted(number: int, noun: str) -> str:
    """A number with its noun in the right form: `1 class`, `2 classes`, `0 images`, `3 epochs`."""
    hissing = noun.endswith(("s", "x", "ch", "sh")) and not noun.endswith("epoch")
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if hissing else 's'}"


def shown_utc(text: str) -> str:
    """A recorded moment as people read it, `2026-03-01 14:00:00 UTC`."""
    return f"{utc_of(text):%Y-%m-%d %H:%M:%S} UTC"
