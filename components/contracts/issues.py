"""Records of what is wrong with data: issues, which findings were looked for, and pairs of pictures that are alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from components.contracts.records import Record, canonical_json, sha256_text

Severity = Literal["critical", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("critical", "warning", "note")
"""The worst first."""
Need = Literal["embeddings", "probabilities", "pairs", "split"]
Relation = Literal["pixels", "re-encoded", "resized", "cropped", "flipped", "near"]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two files that show the same picture, which was verified on their pixels."""

    first: str
    """Path relative to data/, as in the table of facts; so is `second`."""
    second: str
    relation: Relation
    score: float
    """How far apart their pixels are, in [0, 1]: 0 for equal ones, as lower is worse in an issue."""


class Issue(Record):
    """One thing that a person should look at in the data; it decides nothing by itself."""

    kind: str
    """The finding's name."""
    severity: Severity
    files: tuple[str, ...]
    """Paths relative to data/, the one to decide on first; empty where it is about a class or the data as a whole."""
    score: float = Field(ge=0, le=1)
    """Lower is worse."""
    threshold: float = Field(ge=0, le=1)
    """What has this score or a lower one is an issue."""
    detail: str
    """What was found, in one sentence."""
    action: str
    """What to do about it."""
    candidate: str = ""
    """What may be right instead: another label, or the file that it is a copy of."""
    id: str
    """See `issue_id`."""

    @property
    def told(self) -> str:
        """Its files and what was found, in one line."""
        shown = ", ".join(self.files[:3]) + (", ..." if len(self.files) > 3 else "")
        return f"{shown}: {self.detail}" if shown else self.detail


def issue_id(kind: str, files: Iterable[tuple[str, str]], about: str = "") -> str:
    """Names an issue by what its files hold, as pairs of sha256 and label, so that it survives a file's new name.

    `about` is the class that it is about, where it is about no file; the order of the files says nothing.
    """
    return sha256_text(canonical_json([kind, sorted([list(file) for file in files]), about]))[:32]


class Looked(Record):
    """Whether a finding was looked for, and how much was found."""

    name: str
    ran: bool
    reason: str = ""
    """Why it was not looked for; empty when it was."""
    num_issues: int = 0
