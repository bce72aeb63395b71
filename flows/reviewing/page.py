"""The page of a review: a card for each issue with its pictures, for a keyboard, without a server."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from components.contracts.errors import UndecodableImage
from components.contracts.progress import Progress, silent
from components.contracts.wording import counted
from components.images import in_threads
from flows.pages.figures import TEMPLATES, environment
from flows.pages.thumbnails import encoded, media_type
from flows.reviewing import sheet
from flows.reviewing.cards import Card, CardFile

THUMBNAILS = "thumbnails"
_SIDE = 256
"""Pixels that a thumbnail's longer side has at most."""
_SHOWN_FILES = 4
_SHOWN_EXAMPLES = 3


def render(
    version: str,
    cards: Sequence[Card],
    classes: Sequence[str],
    examples: Mapping[str, Sequence[CardFile]],
    thumbnails: Mapping[str, str],
    *,
    csv_name: str,
    left_out: int = 0,
) -> str:
    """HTML of the cards in their order; `thumbnails` are names of files by sha256, as `draw` gives them."""
    script = (TEMPLATES / "review.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

    def told(file: CardFile) -> dict[str, Any]:
        name = thumbnails.get(file.sha256, "")
        shown = f"{THUMBNAILS}/{name}" if name else ""
        return {"path": file.path, "label": file.label, "test": file.test, "thumbnail": shown, "tiny": name.endswith(".png")}

    shown = []
    for card in cards:
        row = sheet.asked_row(version, card)
        shown.append(
            {
                "issue": card.issue.id,
                "kind": card.issue.kind,
                "severity": card.issue.severity,
                "score": row["score"],
                "detail": card.issue.detail,
                "action": card.issue.action,
                "candidate": card.label,
                "proposal": row["proposal"],
                "test": card.is_test,
                "leak": card.is_leak,
                "files": [told(file) for file in pictured(card)],
                "all": [[file.path, file.label] for file in card.files],
                # Places in that list, by which the page knows what two decisions make of one file.
                "copies": [card.files.index(file) for file in card.copies],
                "leaving": [card.files.index(file) for file in card.leaving],
                "labels": sorted({file.label for file in card.files}),
                "more": max(0, len(card.files) - _SHOWN_FILES),
                "row": [row[name] for name in sheet.ASKED],
            }
        )
    data = {
        "version": version,
        "columns": list(sheet.COLUMNS),
        "classes": sorted(classes),
        "csv_name": csv_name,
        "cards": shown,
        "examples": {label: [told(file) for file in files] for label, files in examples.items()},
    }
    return (
        environment()
        .get_template("review.html")
        .render(
            version=version,
            title=f"Review of {counted(len(cards), 'issue')}",
            left_out=left_out,
            csv_name=csv_name,
            data=data,
            script=Markup(script),  # noqa: S704  (our own file, and nothing is put into it)
            script_hash=Markup(f"sha256-{digest}"),  # noqa: S704  (letters, digits and signs of base64)
        )
    )


def pictured(card: Card) -> list[CardFile]:
    """The files of a card that its page shows, the one to decide on first."""
    return [*card.files[:1], *card.twins][:_SHOWN_FILES]


def chosen_examples(cards: Sequence[Card], there: Sequence[CardFile]) -> dict[str, list[CardFile]]:
    """A few files of each label that is proposed, so that it can be seen what it looks like; none that is asked about."""
    asked = {file.sha256 for card in cards for file in card.files}
    found: dict[str, list[CardFile]] = {card.label: [] for card in cards if card.label}
    for file in there:
        examples = found.get(file.label)
        if examples is not None and len(examples) < _SHOWN_EXAMPLES and file.sha256 not in asked:
            examples.append(file)
    return found


def draw(data: Path, files: Sequence[CardFile], out: Path, *, progress: Progress = silent) -> dict[str, str]:
    """Write a thumbnail for each file that can be decoded into the folder `out`; names of the files by sha256.

    One that is there already is kept: it is named after the bytes that it was made of.
    """
    out.mkdir(parents=True, exist_ok=True)
    by_content = {file.sha256: file for file in files if file.sha256}
    names = in_threads(
        lambda file: _thumbnail(data / file.path, file.sha256, out), list(by_content.values()), progress=progress
    )
    return {sha256: name for sha256, name in zip(by_content, names, strict=True) if name}


def _thumbnail(path: Path, sha256: str, out: Path) -> str:
    """The name of the thumbnail; empty where the file cannot be shown."""
    for name in (f"{sha256}.png", f"{sha256}.jpg"):
        if (out / name).is_file() and (out / name).stat().st_size:
            return name
    try:
        made = encoded(path.read_bytes(), _SIDE)
    except (UndecodableImage, OSError):
        return ""
    name = f"{sha256}.{'png' if media_type(made) == 'image/png' else 'jpg'}"
    # Not made durable, unlike what cannot be made again: that would take most of the time.
    temporary = out / f".{name}.{os.getpid()}.tmp"
    temporary.write_bytes(made)
    os.replace(temporary, out / name)
    return name
