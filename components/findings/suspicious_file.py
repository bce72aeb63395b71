"""Files that are more, or something else, than they seem: another format, things behind the picture, very much metadata."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from components.contracts.families import Known
from components.contracts.issues import Issue, Need
from components.contracts.wording import counted

NAME = "suspicious_file"
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "TIFF": (".tif", ".tiff"),
}
_OTHERS = (
    ".gif",
    ".heic",
    ".heif",
    ".avif",
    ".svg",
    ".pdf",
    ".zip",
    ".exe",
    ".txt",
    ".html",
    ".raw",
    ".dng",
    ".jxl",
    ".jp2",
)
_HARMFUL = ("a program", "a script in a web page", "a ZIP archive", "a compressed file", "a web page", "a PDF")
_HARMLESS_BEHIND = ("a JPEG picture", "a film")
"""What cameras and phones put there: previews, the other eye of a stereo camera, the film of a moving photograph."""


class Finding(BaseModel):
    """0 for what may do harm where the file is opened otherwise, 0.5 for what surprises; the picture is used as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    most_behind: int = Field(default=1024, ge=0)
    """Bytes behind the picture's end, of no kind that is known, over which a file is an issue."""
    most_metadata: int = Field(default=1 << 20, ge=0)
    """Bytes of metadata over which a file is an issue, where they are most of it."""

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing but the facts."""
        return frozenset()

    def look(self, known: Known) -> list[Issue]:
        """Every such file, what may do harm first."""
        told = [(row["path"], *self._remarks(row)) for row in known.table.to_dict("records")]
        issues = [
            known.issue(
                NAME,
                [path],
                severity="warning" if is_harmful else "note",
                score=0.0 if is_harmful else 0.5,
                threshold=0.5,
                detail="; ".join(remarks),
                action="ask where it comes from; save the picture again, or remove it"
                if is_harmful
                else "give it the name of its format, or save it again, so that other tools read it, too",
            )
            for path, remarks, is_harmful in told
            if remarks
        ]
        return sorted(issues, key=lambda issue: (issue.score, issue.id))

    def _remarks(self, row: Mapping[Hashable, Any]) -> tuple[list[str], bool]:
        suffix, kind = PurePosixPath(row["path"]).suffix.lower(), row["format"]
        remarks = []
        is_other = suffix in _OTHERS or any(suffix in suffixes for suffixes in _SUFFIXES.values())
        if is_other and suffix not in _SUFFIXES.get(kind, ()):
            remarks.append(f"it is named {suffix} and holds a {kind} picture")
        what, behind = row["behind_is"], row["behind"]
        if what in _HARMFUL or (behind > self.most_behind and what not in _HARMLESS_BEHIND):
            remarks.append(f"{counted(behind, 'byte')} follow the picture's end ({what or 'of no known kind'})")
        if row["metadata"] > self.most_metadata and 2 * row["metadata"] > row["bytes"]:
            remarks.append(f"{row['metadata']} of its {row['bytes']} bytes are metadata")
        return remarks, what in _HARMFUL
