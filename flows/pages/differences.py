"""The page of a difference between two versions of the data: self-contained, without a script."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

from components.contracts.errors import UndecodableImage
from components.contracts.wording import counted
from components.differences import Difference, Moved, balance
from components.formats import Accepted
from components.history import Compared, Version
from components.images import decode
from flows.pages.figures import environment

_SIDE = 128
"""Pixels of the longer side of a thumbnail."""
_CLASSES = 60
"""Rows of the table of classes, those that changed first."""
_LISTED = 500
"""Names under a heading; a page of a million would open in no browser."""
Read = Callable[[str, str], "bytes | str"]


def render(compared: Compared, read: Read, *, most_pictures: int) -> str:
    """HTML with at most `most_pictures` thumbnails under each heading; `read` gives a file's bytes, or why they lack."""
    found = compared.found
    rows = balance(found) if found is not None else []
    return (
        environment()
        .get_template("difference.html")
        .render(
            before=_version(compared.before),
            after=_version(compared.after),
            compared=compared,
            found=found,
            headings=_headings(compared, found, read, most_pictures) if found is not None else [],
            balance=rows,
            largest_share=max((max(row.share_before, row.share_after) for row in rows), default=0) or 1,
            most_classes=_CLASSES,
            most_listed=_LISTED,
            counted=counted,
        )
    )


def _version(version: Version) -> dict[str, Any]:
    commit = version.commit
    return {
        "given": version.given,
        "hash": version.dvc_hash,
        "files": version.num_files,
        "told": f"{commit.at[:16].replace('T', ' ')}, {commit.author}: {commit.message.partition(chr(10))[0]}"
        if commit
        else ("what lies in data/" if version.given == "now" else "what data.dvc pins here"),
    }


def _headings(compared: Compared, found: Difference, read: Read, most: int) -> list[dict[str, Any]]:
    test = {*compared.test.joined, *compared.test.left, *compared.test.relabelled, *compared.test.changed}

    def moved(title: str, told: str, files: Sequence[Moved]) -> dict[str, Any]:
        entries = [([(one.after, one.oid)], f"{one.before} → {one.after}", one.after) for one in files]
        return {"title": title, "told": told, "entries": entries}

    def listed(title: str, told: str, files: dict[str, str]) -> dict[str, Any]:
        return {"title": title, "told": told, "entries": [([(path, oid)], path, path) for path, oid in files.items()]}

    changed = [([(path, oid) for oid in oids], path, path) for path, oids in found.changed.items()]
    headings = [
        moved("Relabelled", "the same bytes in the folder of another class", found.relabelled),
        {"title": "Changed", "told": "other bytes under the same name: before and after", "entries": changed},
        listed("Added", "", found.added),
        listed("Removed", "", found.removed),
        moved("Renamed", "the same bytes under another name of the same class", found.renamed),
    ]
    for heading in headings:
        heading["count"] = len(heading["entries"])
        heading["entries"].sort(key=lambda entry: entry[2] not in test)  # test pictures first
        shown = heading["entries"][:most]
        heading["pictures"] = [
            {
                "images": [_thumbnail(read(path, oid)) for path, oid in files],
                "name": name,
                "test": path in test,
            }
            for files, name, path in shown
        ]
        heading["names"] = [name for _, name, _ in heading["entries"][most : most + _LISTED]]
    return [heading for heading in headings if heading["count"]]


def _thumbnail(content: bytes | str) -> dict[str, str]:
    """A small picture as the text of its address, or why there is none."""
    if isinstance(content, str):
        return {"address": "", "why": content}
    try:
        image = decode(content, Accepted()).srgb()
    except UndecodableImage as error:
        return {"address": "", "why": str(error)}
    image.thumbnail((_SIDE, _SIDE))
    image.info.clear()  # what a file says beside its pixels has no place here
    data = io.BytesIO()
    image.save(data, format="JPEG", quality=80)
    return {"address": "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode(), "why": ""}
